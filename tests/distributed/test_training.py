"""The loss does not depend on how many workers there are, how a batch is cut, or how often a worker dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ray.train import UserCallback
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ckd_ray.checks import load_config
from ckd_ray.config.schema import TrainingConfig
from ckd_ray.data import build_collection
from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.step import BatchEncoder, TrainingStep
from ckd_ray.distill.task import TrainingTask
from ckd_ray.distill.trainer import fit
from ckd_ray.errors import JobError
from ckd_ray.model import ColBERT, ColBERTSettings
from tests.fault.processes import below
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
        settings=TrainingConfig(
            steps=8, batch_size=7, learning_rate=1e-3, negatives=2, log_every=1, checkpoint_every=3
        ),
    )


def changed(task: TrainingTask, **values: object) -> TrainingTask:
    known = TrainingConfig.model_fields
    settings = task.settings.model_copy(update={name: value for name, value in values.items() if name in known})
    return replace(task, settings=settings, **{name: value for name, value in values.items() if name not in known})


@pytest.fixture(scope="module")
def straight(ray_session: None, task: TrainingTask, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    out = tmp_path_factory.mktemp("straight") / "model"
    outcome = fit(task, out=str(out), workers=1)
    assert [r["step"] for r in outcome.metrics] == list(range(8))
    again = fit(task, out=str(out), workers=1)  # as when the command was killed before it knew that all was safe
    assert again.metrics == outcome.metrics
    assert Path(task.run, task.checkpoints).exists(), "they are the caller's to remove"
    return [r["loss"] for r in outcome.metrics]


def test_two_workers_with_cached_gradients_have_the_losses_of_one(
    straight: list[float], task: TrainingTask, tmp_path: Path
) -> None:
    # Seven queries on two workers: slices of three and four, so an average of averages would be off.
    out = tmp_path / "model"
    outcome = fit(
        changed(task, fingerprint="two", accumulate=4, evaluate_every=3, dev_queries=4, dev_passages=20, ema=0.5),
        out=str(out),
        workers="1-2",
    )
    assert outcome.workers == 2
    assert [r["loss"] for r in outcome.metrics] == pytest.approx(straight, abs=1e-4)
    measured = {r["step"] + 1: r["mrr@10"] for r in outcome.metrics if "mrr@10" in r}
    assert list(measured) == [3, 6, 8]
    assert outcome.best == max(measured.values()) and outcome.weights == "best"
    assert outcome.kept_step == min(step for step, value in measured.items() if value == outcome.best)
    assert (out / "last").exists() == (outcome.kept_step != 8)
    ColBERT.from_pretrained(out)
    about = json.loads((out / "training.json").read_text())
    assert about["settings"]["learning_rate"] == 1e-3 and about["result"]["kept_step"] == outcome.kept_step
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == list(range(8))
    assert b"teacher/loss" in next((out / "tensorboard").iterdir()).read_bytes()


def test_a_share_of_the_untrained_encoder_is_in_the_result_alone(
    ray_session: None, task: TrainingTask, straight: list[float], tmp_path: Path
) -> None:
    shared = changed(task, fingerprint="shared", untrained=task.start, untrained_share=0.25)
    outcome = fit(shared, out=str(tmp_path / "model"), workers=1)
    assert [r["loss"] for r in outcome.metrics] == straight
    trained = next(Path(shared.checkpoints).glob("step-00000008")) / "model"
    models = [ColBERT.from_pretrained(folder) for folder in (tmp_path / "model", trained, Path(task.start))]
    for mixed, after, before in zip(*(model.backbone.parameters() for model in models), strict=True):
        assert torch.allclose(mixed, 0.75 * after + 0.25 * before, atol=1e-6)
    assert torch.equal(models[0].projection.weight, models[1].projection.weight)
    assert not torch.allclose(models[1].projection.weight, models[2].projection.weight, atol=1e-6)


def test_training_stops_when_dev_stands_still_and_callbacks_see_every_report(
    ray_session: None, task: TrainingTask, tmp_path: Path
) -> None:
    # Weights that hardly move rank dev alike each time: the second measurement is no better than the first.
    still = changed(task, fingerprint="still", learning_rate=1e-30, evaluate_every=2, patience=1, dev_queries=4)
    seen = tmp_path / "seen"

    class Reports(UserCallback):  # runs in Ray's controller
        def after_report(self, run_context: object, metrics: list[dict[str, object]], checkpoint: object) -> None:
            with open(seen, "a") as file:
                file.write(f"{len(metrics)} workers, {'a' if checkpoint else 'no'} checkpoint\n")

    outcome = fit(still, out=str(tmp_path / "model"), workers=1, callbacks=[Reports()])
    assert (outcome.steps, outcome.weights, outcome.kept_step) == (4, "best", 2)
    assert [r["step"] for r in outcome.metrics] == [0, 1, 2, 3]
    reports = seen.read_text().splitlines()
    assert "1 workers, a checkpoint" in reports and len(reports) >= 2


def test_a_diverged_loss_ends_training_at_once_with_its_cause(
    ray_session: None, task: TrainingTask, tmp_path: Path
) -> None:
    doomed = changed(task, fingerprint="nan", learning_rate=1e30, clip_norm=1e30, warmup=0.0)
    failed = tmp_path / "failed"

    class Failures(UserCallback):  # runs in Ray's controller
        def after_exception(self, run_context: object, worker_exceptions: object) -> None:
            failed.touch()

    with pytest.raises(JobError, match=r"teacher: training failed: .*(score|gradient norm)"):
        fit(doomed, out=str(tmp_path / "model"), workers=1, callbacks=[Failures()])
    assert not failed.exists() and not (tmp_path / "model").exists()


def test_a_killed_worker_costs_nothing(straight: list[float], task: TrainingTask, tmp_path: Path) -> None:
    doomed = changed(task, fingerprint="killed")
    killed: list[int] = []

    def kill() -> None:
        checkpoints = Path(task.run) / "checkpoints" / "teacher-killed"
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not list(checkpoints.glob("step-*")):
            time.sleep(0.05)
        for process in below(os.getpid()):  # this session's Ray only
            if "RayTrainWorker" in process.title:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = fit(doomed, out=str(tmp_path / "model"), workers=2)
    killer.join()
    assert killed
    assert [r["step"] for r in outcome.metrics] == list(range(8))
    assert [r["loss"] for r in outcome.metrics] == pytest.approx(straight, abs=1e-4)


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_the_same_losses(
    straight: list[float], task: TrainingTask, tiny_collection: str, tmp_path: Path
) -> None:
    doomed, out = changed(task, fingerprint="driver"), tmp_path / "model"
    (tmp_path / "task.json").write_text(json.dumps(doomed.to_dict()))
    script = (
        "import json, sys, ray\n"
        "from ckd_ray.distill.task import TrainingTask\n"
        "from ckd_ray.distill.trainer import fit\n"
        "ray.init(address='local', num_cpus=2, object_store_memory=150 * 2**20, include_dashboard=False)\n"
        "fit(TrainingTask.from_dict(json.load(open(sys.argv[1]))), out=sys.argv[2], workers=1)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "task.json"), str(out)]
    checkpoints = Path(task.run) / "checkpoints" / "teacher-driver"
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)
        while driver.poll() is None and not (checkpoints / "checkpoint_manager_snapshot.json").exists():
            time.sleep(0.02)
        driver.kill()
        driver.wait()
        assert not out.exists(), "training was over before the driver was killed"
        subprocess.run(command, stdout=log, stderr=log, check=True, timeout=300)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(8))
    assert [r["loss"] for r in records] == pytest.approx(straight, abs=1e-4)


@pytest.mark.parametrize("accumulate", [2, 7])
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


def test_dropout_follows_from_the_step_alone(task: TrainingTask) -> None:
    noisy = changed(task, dropout=0.3, accumulate=3)
    model = ColBERT.from_pretrained(task.start).train()
    model.set_dropout(0.3)
    inputs = [InputReader(noisy, model.tokenizer).read(i) for i in (0, 0, 1)]
    step = TrainingStep(model, noisy, "fp32")
    first, again = float(step(inputs[0])), float(step(inputs[1]))
    assert first == pytest.approx(again, abs=1e-6)
    model.set_dropout(0.0)
    assert abs(float(step(inputs[0])) - first) > 1e-3


def test_cached_gradients_under_dropout_are_those_of_the_same_masks(task: TrainingTask) -> None:
    """The second encoding of a part draws the masks of the first: a small step along the gradient lowers that loss."""
    noisy = changed(task, dropout=0.3, accumulate=3)
    model = ColBERT.from_pretrained(task.start).train()
    model.set_dropout(0.3)
    inputs, step = InputReader(noisy, model.tokenizer).read(0), TrainingStep(model, noisy, "fp32")
    before = float(step(inputs))
    gradients = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    squared = sum(float(g.square().sum()) for g in gradients)
    size = 1e-3 / squared
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= size * gradient
    assert before - float(step(inputs)) == pytest.approx(size * squared, rel=0.2)


def _steps(task: TrainingTask, rank: int = 0, world: int = 1, steps: int = 3) -> list[float]:
    """The losses of some steps of plain gradient descent on one of `world` workers."""
    model = ColBERT.from_pretrained(task.start)
    encoder: nn.Module = BatchEncoder(model)
    if world > 1:
        encoder = DistributedDataParallel(encoder, broadcast_buffers=False, gradient_as_bucket_view=True)
    reader = InputReader(task, model.tokenizer, rank, world)
    step, optimizer, losses = TrainingStep(encoder, task, "fp32", world, rank), torch.optim.SGD(model.parameters()), []
    for i in range(steps):
        optimizer.zero_grad()
        losses.append(float(step(reader.read(i))))
        optimizer.step()
    return losses


def _worker(rank: int, values: dict[str, object], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timeout=timedelta(seconds=30), rank=rank, world_size=2)
    losses = _steps(TrainingTask.from_dict(values), rank, world=2)
    Path(folder, f"losses-{rank}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def test_workers_with_one_query_and_with_two_meet_in_the_same_collectives(task: TrainingTask, tmp_path: Path) -> None:
    """Three queries on two workers, in two parts: the first worker has a single query, and so a single part."""
    cut = changed(task, batch_size=3, accumulate=2)
    mp.spawn(_worker, (cut.to_dict(), str(tmp_path)), nprocs=2)
    expected = pytest.approx(_steps(changed(cut, accumulate=1)), abs=1e-4)
    assert json.loads((tmp_path / "losses-0.json").read_text()) == expected
    assert json.loads((tmp_path / "losses-1.json").read_text()) == expected
