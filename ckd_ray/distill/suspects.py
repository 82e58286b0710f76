"""Tries the texts of a step at which the workers fail again and again, to find those on which the encoder fails.

Batches follow from the step alone, so a task on the cluster draws them again. It encodes their texts in small batches,
forwards and backwards, and `GuardedEncoder` finds those that end its process or raise an error alone. The weights are
those that training starts from: which text ends a process does not depend on them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from torch import Tensor

from ckd_ray.arrays import Int32Array
from ckd_ray.distill.dev import DevMeasure
from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.placement import Placement
from ckd_ray.distill.progress_actor import NEAR
from ckd_ray.distill.scale import scale_batch
from ckd_ray.distill.task import TrainingTask
from ckd_ray.embed.bad_texts import MOST_TRIES, TRIES, Entry, GuardedEncoder
from ckd_ray.files import delete, join, local_copy
from ckd_ray.model import ColBERT
from ckd_ray.model.encoder import Precision, computing
from ckd_ray.model.length_buckets import CPU_TOKENS, GPU_TOKENS, each_batch
from ckd_ray.model.packed import can_pack, encode_packed
from ckd_ray.ray_util.processes import actor_device
from ckd_ray.ray_util.waiting import answer

PASSAGES = "passages"
# `passages` or `queries.SPLIT`, and the dense index.
Text = tuple[str, int]


def find_bad(task: TrainingTask, step: int, placement: Placement) -> dict[str, list[Entry]]:
    """Find the texts, of `NEAR` steps from `step` on, on which the encoder fails even when it encodes one text alone.

    A process that dies for another reason, or runs out of memory, blames no text.

    Returns:
        `passages` or `queries.SPLIT` -> the bad texts with their causes.

    Raises:
        ray.exceptions.RayError: they could not be tried.
        JobError: the task has no place, or does not end.
    """
    tries = join(task.checkpoints, "step" + TRIES)
    delete(tries)  # a command that was killed may have left it
    gpus = placement.gpus if placement.use_gpu else 0.0
    # SPREAD: not in the placement group of a trial, where there is no room.
    remote: Any = ray.remote(
        num_cpus=placement.cpus, num_gpus=gpus, max_retries=MOST_TRIES, max_calls=1, scheduling_strategy="SPREAD"
    )(try_texts)
    found: dict[str, list[Entry]] = answer("the texts of a step", remote.remote(task.to_dict(), step, tries))
    return found


def try_texts(values: dict[str, Any], step: int, tries: str) -> dict[str, list[Entry]]:
    """The work of `find_bad`, in a process that may die; the next process resumes from the file `tries`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    trial = _Trial(TrainingTask.from_dict(values))
    texts = trial.texts(step)
    encoder = GuardedEncoder(
        tries, len(texts), lambda some: trial.encode([texts[i] for i in some]), f"step {step}", together=1
    )
    bad = encoder.run()[1]
    encoder.done()
    found: dict[str, list[Entry]] = {}
    for i, cause in sorted(bad.items()):
        kind, index = texts[i]
        found.setdefault(kind, []).append({"index": index, "passage_id": trial.id_of(texts[i]), "cause": cause})
    return found


class _Trial:
    """The texts of a training and its encoder."""

    def __init__(self, task: TrainingTask) -> None:
        self.task = task
        with local_copy(task.start) as folder:
            self.model = ColBERT.from_pretrained(folder)
        self.model.set_dropout(task.dropout)
        self.model.to(actor_device()).train()
        self.precision: Precision = "bf16" if task.precision == "bf16" else "fp32"
        self.reader = InputReader(task, self.model.tokenizer)
        self.collection = self.reader.collection
        splits = ("train", "dev") if task.settings.evaluate_every else ("train",)
        self.queries = {f"queries.{split}": self.collection.queries(split) for split in splits}

    def texts(self, step: int) -> list[Text]:
        """The texts of `NEAR` steps from `step` on, each once; for step 0 also those of the score scale, and where dev
        is measured also those of the measurement."""
        reader, settings, texts = self.reader, self.task.settings, dict[Text, None]()
        batches = [reader.plan.batch(at) for at in range(step, min(step + NEAR, settings.steps))]
        if step == 0:
            batches.append(scale_batch(reader.positives, self.collection.num_passages, self.task.seed, reader.left_out))
        for batch in batches:
            texts |= dict.fromkeys(("queries.train", query) for query in batch.queries_B.tolist())
            texts |= dict.fromkeys((PASSAGES, passage) for passage in batch.passages_BM.reshape(-1).tolist())
        if settings.evaluate_every:
            dev = DevMeasure(
                self.task, self.model, rank=0, world=1, device=self.model.device, precision=self.precision,
                left_out=reader.left_out,
            )  # fmt: skip
            texts |= dict.fromkeys(("queries.dev", query) for query in dev.queries_B.tolist())
            texts |= dict.fromkeys((PASSAGES, passage) for passage in dev.pool_P.tolist())
        return list(texts)

    def id_of(self, text: Text) -> str:
        """Its outside id."""
        kind, index = text
        if kind == PASSAGES:
            return self.collection.passage_ids([index])[0]
        return self.queries[kind].ids[index]

    def encode(self, texts: Sequence[Text]) -> None:
        """Tokenise and encode them as training does, with gradients, which are dropped."""
        tokenizer = self.model.tokenizer
        passages = [index for kind, index in texts if kind == PASSAGES]
        settings = self.task.settings  # a measurement on dev reads whole passages
        tokens = tokenizer.passages(
            self.collection.texts(passages), None if settings.evaluate_every else settings.doc_maxlen
        )
        ids_BQ, mask_BQ = tokenizer.queries([self.queries[kind].texts[i] for kind, i in texts if kind != PASSAGES])
        budget = CPU_TOKENS if self.model.device.type == "cpu" else GPU_TOKENS

        def of_passages(batch: Int32Array) -> None:
            self._backward(ids_BQ[:0], mask_BQ[:0], [tokenizer.pad([tokens[i] for i in batch])])

        each_batch(np.array([len(ids) for ids in tokens], np.int32), budget, 1, of_passages)
        lengths = np.full(len(ids_BQ), ids_BQ.shape[1], np.int32)
        each_batch(lengths, budget, 1, lambda batch: self._backward(ids_BQ[batch], mask_BQ[batch], []))

    def _backward(self, ids_BQ: Tensor, mask_BQ: Tensor, groups: list[tuple[Tensor, Tensor]]) -> None:
        device = self.model.device
        ids_BQ, mask_BQ = ids_BQ.to(device), mask_BQ.to(device)
        groups = [(ids.to(device), mask.to(device)) for ids, mask in groups]
        with computing(device, self.precision):
            if can_pack(self.model):
                queries_BQD, found = encode_packed(self.model, ids_BQ, mask_BQ, groups)
                rows = [queries_BQD, *(rows for rows, _ in found)]
            elif groups:
                rows = [self.model.encode_passages(*group)[0] for group in groups]
            else:
                rows = [self.model.encode_queries(ids_BQ, mask_BQ)]
        sum(part.sum() for part in rows).backward()  # type: ignore[union-attr]
