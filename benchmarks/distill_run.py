"""The run that the distillation benchmarks measure on, and the training loop of a worker, timed step by step."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import note
from part import cut

from ckd_ray.config.schema import DistillConfig
from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.step import TrainingStep
from ckd_ray.distill.task import TrainingTask
from ckd_ray.model import ColBERT


@dataclass(frozen=True)
class DistillRun:
    """A run that has its labels: collection, teacher, embeddings, rankings, labels."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that the run was made with."""
        return json.loads((self.folder / "run.json").read_text())["config"]

    def model(self) -> ColBERT:
        """The student before its first step: the teacher's weights."""
        return ColBERT.from_pretrained(self.folder / "teacher")

    def task(self, objective: str, batch_size: int, **values: Any) -> TrainingTask:
        """A training task on this run: the published loss and lists, one negative a query, whatever the run's own are.

        Args:
            values: keys of `distill`.
        """
        given = {
            "objective": objective,
            "loss": "kl",
            "temperature": 0.25,
            "beta": 1.0,
            "negatives": 1,
            "sampling": "uniform",
            "expansion_size": self.config["distill"]["expansion_size"],
            "negatives_depth": self.config["distill"]["negatives_depth"],
            "steps": 1000,
            "batch_size": batch_size,
            "learning_rate": 3e-6,
        }
        return TrainingTask(
            stage="distill",
            run=str(self.folder),
            start=str(self.folder / "teacher"),
            fingerprint="benchmark",
            seed=17,
            settings=DistillConfig.model_validate({"encoder_share": 0.0, "bm25_share": 0.0} | given | values),
            positive_grade=self.config["collection"]["positive_grade"],
        )


def distill_run(args: argparse.Namespace) -> DistillRun:
    """The run of `--run`, or a new one brought up to its labels with a teacher of one step (rates do not depend on
    training)."""
    if args.run:
        folder = Path(args.run).resolve()
        for name in ("teacher", "embeddings", "rankings", "labels"):
            if not (folder / name).exists():
                raise SystemExit(f"{folder}: no {name}/ here; run ckd-ray label first")
        return DistillRun(folder)
    from ckd_ray.checks import load_config
    from ckd_ray.pipeline.runner import run_stages
    from ckd_ray.progress import set_quiet
    from ckd_ray.ray_util.session import connected

    storage = tempfile.mkdtemp(prefix="ckd-ray-benchmark-")
    values = [f"run.storage={storage}", "run.name=distill", "teacher.steps=1", "teacher.batch_size=2"]
    values += ["model.doc_maxlen=180", "collection.limit=null"]
    if args.data:
        folder = args.data
        if args.quick:
            folder = f"{storage}/data"
            cut(Path(args.data), Path(folder), {"train": 300}, passages=1000)
        values += ["collection.format=msmarco", f"collection.path={folder}", "collection.packages=null"]
    elif args.quick:
        values.append("collection.limit=1000")
    note("preparing a run up to its labels")
    set_quiet(True)
    with connected("local"):
        run_stages(load_config(None, values), until="label")
    return DistillRun(Path(storage) / "distill")


def seconds_a_step(run: DistillRun, task: TrainingTask, first: int, count: int, model: ColBERT) -> list[float]:
    """Of each of the steps [first, first + count). The step before `first` warms up and is not in the list."""
    steps = timed_steps(task, max(1, first), model)
    return [next(steps) for _ in range(count)]


def timed_steps(task: TrainingTask, first: int, model: ColBERT) -> Iterator[float]:
    """The worker's loop from step `first` on: read ahead by a thread, forward, backward, clip, AdamW.

    Yields the seconds of each, waiting for its batch included. The step before `first` warms up.
    """
    model.train()
    step = TrainingStep(model, task, "fp32")
    settings = task.settings
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    reader = InputReader(task, model.tokenizer)
    stream = reader.stream(first - 1)

    def one() -> float:
        started = time.perf_counter()
        inputs = next(stream)
        optimizer.zero_grad(set_to_none=True)
        step(inputs.to(model.device))
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        return time.perf_counter() - started

    try:
        one()
        while True:
            yield one()
    finally:
        stream.close()  # type: ignore[attr-defined]


def median(values: list[float]) -> float:
    """Of a list that is not empty."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


Part = Callable[[DistillRun, argparse.Namespace, dict[str, Any]], dict[str, dict[str, Any]]]
