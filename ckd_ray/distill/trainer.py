"""The driver's side of training: places workers, follows them, and brings the trained checkpoint into the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from ckd_ray.distill.task import TrainingTask
from ckd_ray.errors import JobError, UserError
from ckd_ray.progress import Progress
from ckd_ray.store.files import delete, filesystem_of, is_local, join, new_folder

# `ray.train.report` blocks for one period of the controller's polling; two seconds by default is most of a short run.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


@dataclass(frozen=True)
class TrainingOutcome:
    """metrics: one record every `log_every` steps (step, loss, learning_rate, ...); workers: how many ran."""

    metrics: list[dict[str, Any]]
    workers: int


class _Board:
    """A tiny actor between the workers and the driver: the last step, and its loss."""

    def __init__(self) -> None:
        self.step, self.loss = 0, float("nan")

    def tell(self, step: int, loss: float) -> None:
        self.step, self.loss = step, loss

    def read(self) -> tuple[int, float]:
        return self.step, self.loss


def plan_workers(workers: int | Literal["auto"], batch_size: int, key: str) -> tuple[int, bool]:
    """(number of workers, whether each takes a GPU). `auto`: one a GPU, else one.

    Raises:
        UserError: they do not fit the cluster, or the batch is smaller than their number.
    """
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    use_gpu = gpus > 0
    room = min(gpus, cpus) if use_gpu else cpus
    chosen = min(max(1, gpus), batch_size) if workers == "auto" else workers
    if chosen > room:
        raise UserError(
            "the training workers do not fit the cluster",
            where=f"{key}.workers",
            expected=f"at most {room}",
            found=f"{chosen}; the cluster has {cpus} CPU and {gpus} GPU",
            fix=f"set {key}.workers: auto, or add nodes",
        )
    if chosen > batch_size:
        raise UserError(
            "more workers than queries in a batch",
            where=f"{key}.batch_size",
            expected=f">= {chosen}",
            found=str(batch_size),
        )
    return chosen, use_gpu


def fit(
    task: TrainingTask, *, out: str, workers: int | Literal["auto"] = "auto", max_failures: int = 3
) -> TrainingOutcome:
    """Train, and put the final checkpoint at `out`. Called again after a crash, it goes on from the last checkpoint.

    Raises:
        UserError: the workers do not fit. JobError: training failed; the cause is in the message.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from ckd_ray.distill.worker import train_worker

    count, use_gpu = plan_workers(workers, task.batch_size, task.stage)
    board_name = f"ckd-ray-board-{uuid.uuid4().hex[:8]}"
    remote: Any = ray.remote(num_cpus=0)(_Board)
    board = remote.options(name=board_name).remote()
    ray.get(board.read.remote())
    checkpoints = join(task.run, "checkpoints")
    fs, path = filesystem_of(checkpoints)
    name = f"{task.stage}-{task.fingerprint[:16]}"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task.to_dict(), "board": board_name},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(num_workers=count, use_gpu=use_gpu, resources_per_worker=_resources(use_gpu)),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=None if is_local(checkpoints) else fs,
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    with _followed(task, board):
        result = _run(trainer, task)
    metrics = _take(result, out)
    ray.kill(board)
    delete(join(checkpoints, name))
    return TrainingOutcome(metrics, count)


def _resources(use_gpu: bool) -> dict[str, float]:
    return {"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1}


def _run(trainer: Any, task: TrainingTask) -> Any:
    from ray.train.v2.api.exceptions import TrainingFailedError

    before = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except SystemExit as error:  # how Ray Train's own Ctrl-C handler leaves, after it has stopped the workers
        raise KeyboardInterrupt from error
    except TrainingFailedError as error:
        raise JobError(f"{task.stage}: training failed: {_cause(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
    if result.error is not None:
        raise JobError(f"{task.stage}: training failed: {_cause(result.error)}")
    if result.checkpoint is None:
        raise JobError(f"{task.stage}: training ended without a checkpoint")
    return result


def _cause(error: BaseException) -> str:
    """The workers' own message, without Ray's frames around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _followed:
    """Shows progress from the board while `fit` blocks the main thread."""

    def __init__(self, task: TrainingTask, board: Any) -> None:
        self.progress = Progress(task.stage, task.steps, "steps")
        self._board, self._stop = board, threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        first = True
        while not self._stop.wait(0.5):
            try:
                step, loss = ray.get(self._board.read.remote(), timeout=5)
            except (ray.exceptions.RayError, ConnectionError):
                continue
            if step and first:
                # The rate counts from the first finished step: before it the workers start and a resumed run skips.
                self.progress = Progress(self.progress.stage, self.progress.total, "steps", done=step)
                first = False
            self.progress.note = f"loss {loss:.4f}"
            if step:
                self.progress.reach(step)

    def __enter__(self) -> _followed:
        self.progress.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self.progress.__exit__(*exc)


def _take(result: Any, out: str) -> list[dict[str, Any]]:
    """Copy the model of the last checkpoint to `out`; returns the metrics kept with it."""
    with result.checkpoint.as_directory() as folder:
        state = json.loads((Path(folder) / "state.json").read_text())
        with new_folder(out) as target:
            shutil.copytree(Path(folder) / "model", target, dirs_exist_ok=True)
            lines = [json.dumps(record) + "\n" for record in state["records"]]
            (Path(target) / "metrics.jsonl").write_text("".join(lines))
    return state["records"]
