"""The loss does not depend on how many workers there are, how a batch is cut, or how often a worker dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from ckd_ray.config import load_config
from ckd_ray.data import build_collection
from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.step import TrainingStep
from ckd_ray.distill.task import TrainingTask
from ckd_ray.distill.trainer import fit
from ckd_ray.model import ColBERT, ColBERTSettings
from tests.support import overrides


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> TrainingTask:
    run = tmp_path_factory.mktemp("training")
    config = load_config(None, overrides(run, tiny_backbone, tiny_collection))
    build_collection(config.collection, str(run))
    settings = ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)
    ColBERT.from_backbone(tiny_backbone, settings, seed=1).save(run / "start")
    return TrainingTask(
        stage="teacher",
        run=str(run),
        start=str(run / "start"),
        fingerprint="straight",
        seed=17,
        steps=8,
        batch_size=7,
        learning_rate=1e-3,
        negatives=2,
        log_every=1,
        checkpoint_every=3,
    )


def changed(task: TrainingTask, **values: object) -> TrainingTask:
    return TrainingTask.from_dict(task.to_dict() | values)


@pytest.fixture(scope="module")
def straight(ray_session: None, task: TrainingTask, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    out = tmp_path_factory.mktemp("straight") / "model"
    outcome = fit(task, out=str(out), workers=1)
    assert [r["step"] for r in outcome.metrics] == list(range(8))
    assert not (Path(task.run) / "checkpoints" / "teacher-straight").exists()
    return [r["loss"] for r in outcome.metrics]


def test_two_workers_have_the_losses_of_one(straight: list[float], task: TrainingTask, tmp_path: Path) -> None:
    # Seven queries on two workers: slices of three and four, so an average of averages would be off.
    outcome = fit(changed(task, fingerprint="two"), out=str(tmp_path / "model"), workers=2)
    assert outcome.workers == 2
    assert [r["loss"] for r in outcome.metrics] == pytest.approx(straight, abs=1e-4)


def test_a_killed_worker_costs_nothing(straight: list[float], task: TrainingTask, tmp_path: Path) -> None:
    import psutil

    doomed = changed(task, fingerprint="killed")
    killed: list[int] = []

    def kill() -> None:
        checkpoints = Path(task.run) / "checkpoints" / "teacher-killed"
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not list(checkpoints.glob("step-*")):
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):  # this session's Ray only
            if "RayTrainWorker" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = fit(doomed, out=str(tmp_path / "model"), workers=1)
    killer.join()
    assert killed
    assert [r["step"] for r in outcome.metrics] == list(range(8))
    assert [r["loss"] for r in outcome.metrics] == pytest.approx(straight, abs=1e-4)


@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_cached_gradients_are_the_plain_ones(task: TrainingTask, accumulate: int) -> None:
    def step(parts: int) -> tuple[float, list[torch.Tensor]]:
        cut = changed(task, accumulate=parts)
        model = ColBERT.from_pretrained(task.start)
        inputs = InputReader(cut, model.tokenizer).read(0)
        loss = float(TrainingStep(model, cut, "fp32")(inputs))
        return loss, [p.grad for p in model.parameters() if p.grad is not None]

    plain, parts = step(1), step(accumulate)
    assert parts[0] == pytest.approx(plain[0], abs=1e-5)
    assert len(parts[1]) == len(plain[1])
    for mine, expected in zip(parts[1], plain[1], strict=True):
        assert torch.allclose(mine, expected, atol=1e-5)
