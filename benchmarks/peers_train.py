"""Trains a student with PyLate or sentence-transformers; `peers.py` runs it in the library's environment.

    PYTHON benchmarks/peers_train.py JOB.json

The job is `peers.job`'s. The rows are JSON lines: `query`, `passages` (the labelled one first) and `scores`, the
teacher's score of each. The checkpoint goes to the job's `out`; the last line of standard output is a JSON object.
"""

from __future__ import annotations

import itertools
import json
import string
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

BESIDE = ("sentence-transformers", "transformers", "torch")  # whose versions are told with the library's


def main(path: str) -> dict[str, Any]:
    """Train as the job says. Returns the loss, the seconds and the versions."""
    import torch
    from transformers import set_seed

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    torch.set_num_threads(job["threads"])
    set_seed(job["seed"])
    make = {"sentence-transformers": sentence_transformers_trainer, "pylate": pylate_trainer}[job["library"]]
    trainer, loss = make(job, rows)
    clock = _clock()
    trainer.add_callback(clock)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.model.save_pretrained(job["out"])
    steps = sorted(after - before for before, after in itertools.pairwise(clock.ends))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.state.global_step != job["steps"]:
        raise SystemExit(f"{trainer.state.global_step} steps were made, expected {job['steps']}")
    return {
        "loss": loss,
        "losses": [round(value, 4) for value in losses],
        "seconds": round(seconds, 1),
        "seconds_a_step": round(steps[len(steps) // 2], 3) if steps else None,
        "versions": {
            name: version(name) for name in (job["library"], "sentence-transformers", "transformers", "torch")
        },
    }


def columns(job: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The rows in the columns that the library documents for the recipe; the first one is the query."""
    found: dict[str, list[Any]] = {"query": [row["query"] for row in rows]}
    scores = [scaled(row["scores"], job["teacher_scores"]) for row in rows] if job["recipe"] == "kl" else []
    if job["library"] == "pylate" and scores:
        return {**found, "documents": [row["passages"] for row in rows], "scores": scores}
    names = [f"document_{i}" for i in range(len(rows[0]["passages"]))]
    if not scores:
        names = ["positive", *(f"negative_{i}" for i in range(1, len(names)))]
    for i, name in enumerate(names):
        found[name] = [row["passages"][i] for row in rows]
    return {**found, "scores": scores} if scores else found


def scaled(scores: list[float], how: str) -> list[float]:
    """A query's teacher scores: `raw`, or brought to 0..1 (`minmax`); equal scores are then all 0."""
    if how == "raw":
        return scores
    low, high = min(scores), max(scores)
    return [(score - low) / (high - low) if high > low else 0.0 for score in scores]


def sentence_transformers_trainer(job: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[Any, str]:
    """MultiVectorEncoder: the stack of modules that its documentation builds, its trainer and its losses."""
    from datasets import Dataset
    from sentence_transformers import (
        MultiVectorEncoder,
        MultiVectorEncoderTrainer,
        MultiVectorEncoderTrainingArguments,
    )
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.base.sampler import BatchSamplers
    from sentence_transformers.multi_vector_encoder import losses
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    expanded = job["form"] == "expanded"
    length = job["query_maxlen"]
    queries: dict[str, Any] = {"query_length": length}
    if expanded:
        queries = {"query_expansion": {"strategy": "fixed", "length": length}}
    encoder = Transformer(job["backbone"], document_length=job["doc_maxlen"], **queries)
    projection = Dense(
        encoder.get_embedding_dimension(),
        job["dim"],
        bias=False,
        activation_function=None,
        module_input_name="token_embeddings",
    )
    mask = MultiVectorMask(skiplist_words=list(string.punctuation) if expanded else None)
    normalize = Normalize(module_input_name="token_embeddings")
    model = MultiVectorEncoder(modules=[encoder, projection, mask, normalize], device="cpu")
    given = job["temperature"]
    arguments = _arguments(job)
    loss: Any
    if job["recipe"] == "contrastive":
        arguments["batch_sampler"] = BatchSamplers.NO_DUPLICATES
        values = {} if given is None else {"scale": 1 / given}
        loss = losses.MultiVectorMultipleNegativesRankingLoss(model, **values)
    else:
        values = {} if given is None else {"temperature": given}
        loss = losses.MultiVectorDistillKLDivLoss(model, **values)
    trainer = MultiVectorEncoderTrainer(
        model=model,
        args=MultiVectorEncoderTrainingArguments(**arguments),
        train_dataset=Dataset.from_dict(columns(job, rows)),
        loss=loss,
    )
    return trainer, f"{type(loss).__name__} {json.dumps(loss.get_config_dict())}"


def pylate_trainer(job: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[Any, str]:
    """PyLate's ColBERT with its own form (markers, expansion, punctuation left out), trainer, collator and losses."""
    from datasets import Dataset
    from pylate import losses, models, utils
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    model = models.ColBERT(
        job["backbone"],
        device="cpu",
        embedding_size=job["dim"],
        query_length=job["query_maxlen"],
        document_length=job["doc_maxlen"],
    )
    given = job["temperature"]
    loss: Any
    if job["recipe"] == "contrastive":
        values = {} if given is None else {"temperature": given}
        loss, said = losses.Contrastive(model=model, **values), f"Contrastive {json.dumps(values)}"
    elif given is None:
        normalize = job["teacher_scores"] == "minmax"
        loss = losses.Distillation(model=model, normalize_scores=normalize)
        said = f"Distillation {json.dumps({'normalize_scores': normalize})}"
    else:
        loss = losses.Distillation(model=model, score_metric=_divided(given), normalize_scores=False)
        said = f"Distillation score_metric=colbert_kd_scores/{given:g}, normalize_scores=False"
    data = columns(job, rows)
    if job["recipe"] == "kl" and given is not None:
        data["scores"] = [[score / given for score in scores] for scores in data["scores"]]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**_arguments(job)),
        train_dataset=Dataset.from_dict(data),
        loss=loss,
        data_collator=utils.ColBERTCollator(model.tokenize),
    )
    return trainer, said


def _divided(temperature: float) -> Any:
    """PyLate's score for distillation over a temperature, which its loss has no argument for."""
    from pylate.scores import colbert_kd_scores

    def scores(*args: Any, **kwargs: Any) -> Any:
        return colbert_kd_scores(*args, **kwargs) / temperature

    return scores


def _arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Of the trainer, which is transformers' in both libraries: AdamW and a linear schedule are its defaults."""
    return {
        "output_dir": str(Path(job["out"]).parent / "trainer"),
        "per_device_train_batch_size": job["queries_per_step"],
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "warmup_steps": round(job["warmup"] * job["steps"]),
        "bf16": job["precision"] == "bf16",
        "seed": job["seed"],
        "use_cpu": True,
        "dataloader_drop_last": True,  # every step has the whole batch
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": max(1, job["steps"] // 10),
        "disable_tqdm": True,
    }


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """When each step ended."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    return Clock()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
