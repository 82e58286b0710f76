"""Steps a second against sentence-transformers' MultiVectorEncoder trainer with its KL distillation loss.

    PYTHON benchmarks/distill_peer.py BATCHES.json      (what the benchmark starts, in the peer's Python)

Both train the same backbone with a projection of 128 on the same texts, one positive and one negative a query, in
float32, AdamW, with the same threads. The peer scores a query against its own two passages, ours against all of the
batch, so its step has less to do.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from distill_run import DistillRun


def steps_vs_peer(run: DistillRun, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Ours, the peer, ours again; medians."""
    from common import figure, note
    from distill_run import median, seconds_a_step

    batch, steps = (8, 5) if args.quick else (32, 8)
    python = args.peer_python or sys.executable
    task = run.task("collective", batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batches.json"
        path.write_text(json.dumps(_batches(run, task, steps + 1)))
        ours = seconds_a_step(run, task, 1, steps, run.model())
        done = subprocess.run(
            [python, os.path.abspath(__file__), str(path)],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
        )
        ours += seconds_a_step(run, task, 1, steps, run.model())
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        note(f"  no figure: {python}: {said}")
        settings["peer"] = {"left_out": said}
        return {"steps_vs_sentence_transformers": figure(None, 1.2, "higher")}
    peer = json.loads(done.stdout.splitlines()[-1])
    settings["peer"] = {
        "batch": batch,
        "ours_seconds": round(median(ours), 4),
        "peer_seconds": round(median(peer["seconds"]), 4),
        "steps": [len(ours), len(peer["seconds"])],
        "versions": peer["versions"],
        "passages": "the same texts; the trainer may draw them in another order",
    }
    return {"steps_vs_sentence_transformers": figure(median(peer["seconds"]) / median(ours), 1.2, "higher")}


def _batches(run: DistillRun, task: Any, steps: int) -> dict[str, Any]:
    """Texts and teacher scores of the first steps: a row is (query, positive, negative) and two scores."""
    import torch

    from ckd_ray.collective import teacher_scores
    from ckd_ray.distill.inputs import InputReader

    model = run.model()
    reader = InputReader(task, model.tokenizer)
    rows: dict[str, list[Any]] = {"query": [], "positive": [], "negative": [], "label": []}
    for step in range(steps):
        batch, inputs = reader.plan.batch(step), reader.read(step)
        t = inputs.teacher
        found = [teacher_scores(t.queries_bQD, t.expansions_bED, t.weights_bE, *rows) for rows in t.passages]
        scores_BN = torch.cat(found, 1)[:, inputs.columns_n.argsort()]
        texts = reader.collection.texts(batch.passages_BM.reshape(-1))
        rows["query"] += [reader.query_texts[i] for i in batch.queries_B.tolist()]
        rows["positive"] += texts[::2]
        rows["negative"] += texts[1::2]
        own_BM = torch.arange(len(texts)).view(-1, 2)
        rows["label"] += (scores_BN.gather(1, own_BM) * 0.25**-1).tolist()
    model_settings = run.config["model"]
    return {
        "rows": rows,
        "backbone": str(run.folder / "teacher"),
        "batch": task.settings.batch_size,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "query_maxlen": model_settings["query_maxlen"],
        "doc_maxlen": model_settings["doc_maxlen"],
    }


def peer(path: str) -> dict[str, Any]:
    """Train with sentence-transformers; the seconds of each step after the first, and versions."""
    import sentence_transformers
    import torch
    import transformers
    from datasets import Dataset
    from sentence_transformers import (
        MultiVectorEncoder,
        MultiVectorEncoderTrainer,
        MultiVectorEncoderTrainingArguments,
    )
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.losses import MultiVectorDistillKLDivLoss
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from transformers import TrainerCallback

    given = json.loads(Path(path).read_text())
    torch.set_num_threads(given["threads"])
    backbone = Transformer(
        given["backbone"],
        query_length=given["query_maxlen"],
        document_length=given["doc_maxlen"],
        query_expansion={"strategy": "fixed", "attend": False, "length": given["query_maxlen"]},
    )
    projection = Dense(
        backbone.get_embedding_dimension(),
        128,
        bias=False,
        activation_function=torch.nn.Identity(),
        module_input_name="token_embeddings",
    )
    mask = MultiVectorMask(skiplist_words=list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"))
    model = MultiVectorEncoder(
        modules=[backbone, projection, mask, Normalize(module_input_name="token_embeddings")], device="cpu"
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    arguments = MultiVectorEncoderTrainingArguments(
        output_dir=os.getcwd(),
        per_device_train_batch_size=given["batch"],
        max_steps=given["steps"],
        learning_rate=3e-6,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )
    MultiVectorEncoderTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(given["rows"]),
        loss=MultiVectorDistillKLDivLoss(model),
        callbacks=[Clock()],
    ).train()
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    versions = {module.__name__: module.__version__ for module in (sentence_transformers, transformers, torch)}
    return {"seconds": seconds, "versions": versions}


if __name__ == "__main__":
    print(json.dumps(peer(sys.argv[1])))
