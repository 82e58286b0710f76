"""Runs inside the environment of one library, without ckd-ray: trains ten steps on a folder that
`ckd-ray export --what labels` wrote, with the library's own reader, collator, loss and loop.

    python train_on_labels.py LIBRARY FOLDER BACKBONE OUT.json

OUT.json: {"steps": ..., "losses": [...], "weights_changed": true, "examples": how many the library's reader counts,
"seen": the first of them as the loss meets it ({"query": ..., "passages": [...], "scores": [...]}), "versions": {...}}.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

STEPS, BATCH, WIDTH = 10, 2, 6


def parts(folder: str) -> dict[str, Any]:
    from datasets import load_dataset

    names = ("train", "queries", "documents")
    return {n: load_dataset("parquet", data_files=f"{folder}/{n}.parquet", split="train") for n in names}


def arguments(out: str) -> dict[str, Any]:
    return {
        "output_dir": out,
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 1,
    }


def seen(query: str, passages: list[str], scores: list[float]) -> dict[str, Any]:
    return {"query": query, "passages": list(passages), "scores": list(scores)}


def train(trainer: Any, examples: int, first: dict[str, Any]) -> dict[str, Any]:
    """By a Trainer of transformers, as most of the libraries have it."""
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    changed = any(bool((p != b).any()) for p, b in zip(trainer.model.parameters(), before, strict=True))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = trainer.state.global_step
    return {"steps": steps, "losses": losses, "weights_changed": changed, "examples": examples, "seen": first}


def readable(backbone: str, folder: str) -> str:
    """A copy of the backbone whose tokenizer transformers 4 knows by the name of its class."""
    copy = Path(folder) / "backbone"
    shutil.copytree(backbone, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return str(copy)


def pylate(folder: str, backbone: str, out: str) -> dict[str, Any]:
    """By KDProcessing, which joins the three files and reads list columns, and the loss for distillation."""
    from pylate import losses, models, utils
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    found = parts(folder)
    found["train"].set_transform(
        utils.KDProcessing(queries=found["queries"], documents=found["documents"], n_ways=WIDTH).transform
    )
    model = models.ColBERT(backbone, device="cpu", embedding_size=16, query_length=8, document_length=12)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**arguments(out)),
        train_dataset=found["train"],
        loss=losses.Distillation(model=model),
        data_collator=utils.ColBERTCollator(model.tokenize),
    )
    first = found["train"][0]
    return train(trainer, len(found["train"]), seen(first["query"], first["documents"], first["scores"]))


def sentence_transformers(folder: str, backbone: str, out: str) -> dict[str, Any]:
    """Columns query, document_0, ... and scores, made from the three files."""
    from datasets import Dataset
    from sentence_transformers import (
        MultiVectorEncoder,
        MultiVectorEncoderTrainer,
        MultiVectorEncoderTrainingArguments,
    )
    from sentence_transformers.multi_vector_encoder import losses

    found = parts(folder)
    queries = dict(zip(found["queries"]["query_id"], found["queries"]["text"], strict=True))
    documents = dict(zip(found["documents"]["document_id"], found["documents"]["text"], strict=True))
    rows = []
    for row in found["train"]:
        named = {f"document_{i}": documents[d] for i, d in enumerate(row["document_ids"])}
        rows.append({"query": queries[row["query_id"]], **named, "scores": row["scores"]})
    data = Dataset.from_list(rows)
    model = MultiVectorEncoder(backbone, device="cpu")
    trainer = MultiVectorEncoderTrainer(
        model=model,
        args=MultiVectorEncoderTrainingArguments(**arguments(out)),
        train_dataset=data,
        loss=losses.MultiVectorDistillKLDivLoss(model),
    )
    first = data[0]
    passages = [first[f"document_{i}"] for i in range(WIDTH)]
    return train(trainer, len(data), seen(first["query"], passages, first["scores"]))


def flagembedding(folder: str, backbone: str, out: str) -> dict[str, Any]:
    """By the runner of encoders with one vector a text, with knowledge distillation: all negatives, in any order."""
    from FlagEmbedding.finetune.embedder.encoder_only.base import (
        EncoderOnlyEmbedderDataArguments,
        EncoderOnlyEmbedderModelArguments,
        EncoderOnlyEmbedderRunner,
        EncoderOnlyEmbedderTrainingArguments,
    )

    runner = EncoderOnlyEmbedderRunner(
        model_args=EncoderOnlyEmbedderModelArguments(backbone),
        data_args=EncoderOnlyEmbedderDataArguments(
            train_data=[folder],
            cache_path=f"{out}/cache",
            train_group_size=WIDTH,
            query_max_len=8,
            passage_max_len=32,
            knowledge_distillation=True,
        ),
        training_args=EncoderOnlyEmbedderTrainingArguments(**arguments(f"{out}/run")),
    )
    return train(runner.trainer, len(runner.train_dataset), seen(*runner.train_dataset[0]))


def tevatron(folder: str, backbone: str, out: str) -> dict[str, Any]:
    """As its driver train_distil does it: all negatives, in any order."""
    import torch
    from tevatron.retriever.arguments import DataArguments, ModelArguments, TevatronTrainingArguments
    from tevatron.retriever.collator import DistilTrainCollator
    from tevatron.retriever.dataset import DistilTrainDataset
    from tevatron.retriever.modeling import DenseModel
    from tevatron.retriever.trainer import DistilTevatronTrainer
    from transformers import AutoTokenizer

    given = TevatronTrainingArguments(**arguments(f"{out}/run"))
    data = DistilTrainDataset(
        DataArguments(
            dataset_path=f"{folder}/train.jsonl",
            dataset_cache_dir=f"{out}/cache",
            train_group_size=WIDTH,
            query_max_len=8,
            passage_max_len=32,
        )
    )
    model = DenseModel.build(
        ModelArguments(backbone, normalize=True), given, attn_implementation="eager", torch_dtype=torch.float32
    )
    collator = DistilTrainCollator(AutoTokenizer.from_pretrained(backbone), data.data_args, torch.float32)
    trainer = DistilTevatronTrainer(model=model, args=given, train_dataset=data, data_collator=collator)
    data.set_trainer(trainer)
    trainer.state.epoch = 0
    query, passages, scores = data[0]
    return train(trainer, len(data), seen(query[0], [passage[0] for passage in passages], scores))


def colbert_ai(folder: str, backbone: str, out: str) -> dict[str, Any]:
    """By its training loop in this process. On a CPU two things of its set-up are replaced: the process group, which it
    makes on a GPU only, and the device numbers, which it gives to DistributedDataParallel."""
    import torch
    from colbert.infra import ColBERTConfig, Run, RunConfig
    from colbert.modeling.colbert import ColBERT
    from colbert.training import training
    from colbert.training.lazy_batcher import LazyBatcher

    files = [f"{folder}/{name}" for name in ("train.jsonl", "queries.tsv", "collection.tsv")]
    config = ColBERTConfig(
        checkpoint=backbone, bsize=BATCH, nway=WIDTH, maxsteps=STEPS, lr=1e-3, dim=16, query_maxlen=8, doc_maxlen=32,
        amp=False, rank=0, nranks=1,
    )  # fmt: skip
    losses = []

    class Recording(training.MixedPrecisionManager):
        def backward(self, loss: torch.Tensor) -> None:
            losses.append(loss.item())
            super().backward(loss)

    ColBERT.loaded_extensions = True  # its C++ search kernel, which is not asked here, would be compiled
    training.MixedPrecisionManager = Recording
    parallel = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda model, **_: parallel(model, find_unused_parameters=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/group", rank=0, world_size=1)
    reader = LazyBatcher(config, *files)
    query, *pairs = reader.triples[0]
    first = seen(reader.queries[query], [reader.collection[p] for p, _ in pairs], next(reader)[0][2][:WIDTH])
    with Run().context(RunConfig(root=out, experiment="labels", rank=0, nranks=1)):
        trained = training.train(config, *files)
    torch.distributed.destroy_process_group()
    models = [ColBERT(name, config).bert.state_dict() for name in (backbone, trained)]
    changed = any(bool((models[0][name] != models[1][name]).any()) for name in models[0])
    said = {"steps": len(losses), "losses": losses, "weights_changed": changed}
    return {**said, "examples": len(reader), "seen": first}


MAKE = {
    "pylate": pylate,
    "sentence-transformers": sentence_transformers,
    "flagembedding": flagembedding,
    "tevatron": tevatron,
    "colbert-ai": colbert_ai,
}

if __name__ == "__main__":
    import torch

    library, folder, backbone, out = sys.argv[1:]
    torch.manual_seed(1)  # for the projections that some of the libraries draw
    with tempfile.TemporaryDirectory() as scratch:
        said = MAKE[library](folder, readable(backbone, scratch), scratch)
    with open(out, "w", encoding="utf-8") as file:
        json.dump({**said, "versions": {name: version(name) for name in (library, "torch", "transformers")}}, file)
