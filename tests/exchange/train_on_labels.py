"""Runs inside the environment of one library, without ckd-ray: trains ten steps on a folder that
`ckd-ray export --what labels` wrote, as the library's documentation does it.

    python train_on_labels.py LIBRARY FOLDER BACKBONE OUT.json

OUT.json: {"steps": ..., "losses": [...], "weights_changed": true, "seen": the scores of the first query as the loss met
them, "versions": {...}}.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from typing import Any

STEPS = 10


def parts(folder: str) -> dict[str, Any]:
    from datasets import load_dataset

    names = ("train", "queries", "documents")
    return {n: load_dataset("parquet", data_files=f"{folder}/{n}.parquet", split="train") for n in names}


def arguments(out: str) -> dict[str, Any]:
    return {
        "output_dir": out,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 1,
    }


def pylate(folder: str, backbone: str, out: str) -> tuple[Any, list[float]]:
    """By KDProcessing, which joins the three files and reads list columns, and the loss for distillation."""
    from pylate import losses, models, utils
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    found = parts(folder)
    found["train"].set_transform(
        utils.KDProcessing(queries=found["queries"], documents=found["documents"], n_ways=6).transform
    )
    model = models.ColBERT(backbone, device="cpu", embedding_size=16, query_length=8, document_length=12)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**arguments(out)),
        train_dataset=found["train"],
        loss=losses.Distillation(model=model),
        data_collator=utils.ColBERTCollator(model.tokenize),
    )
    return trainer, list(found["train"][0]["scores"])


def sentence_transformers(folder: str, backbone: str, out: str) -> tuple[Any, list[float]]:
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
    return trainer, list(data[0]["scores"])


MAKE = {"pylate": pylate, "sentence-transformers": sentence_transformers}

if __name__ == "__main__":
    library, folder, backbone, out = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        trainer, seen = MAKE[library](folder, backbone, scratch)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
    changed = any(bool((p != b).any()) for p, b in zip(trainer.model.parameters(), before, strict=True))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    said = {"steps": trainer.state.global_step, "losses": losses, "weights_changed": changed, "seen": seen}
    with open(out, "w", encoding="utf-8") as file:
        json.dump({**said, "versions": {name: version(name) for name in (library, "torch", "transformers")}}, file)
