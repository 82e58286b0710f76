"""The training loop of one Ray Train worker.

A checkpoint is a folder: `model/` (a ColBERT checkpoint), `optimizer.pt` (read with weights_only), `state.json` (the
next step and the metrics so far). Batches, warm-up and decay follow from the step number, so nothing else is needed to
go on as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device, prepare_model

from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.step import TrainingStep
from ckd_ray.distill.task import TrainingTask
from ckd_ray.model import ColBERT
from ckd_ray.store.files import local_copy


class _Progress:
    """Tells the driver how far training is, without waiting for an answer."""

    def __init__(self, name: str) -> None:
        self._board = None
        with suppress(ValueError):
            self._board = ray.get_actor(name)

    def tell(self, step: int, loss: float) -> None:
        if self._board is not None:
            self._board.tell.remote(step, loss)


class WorkerState:
    """Model, optimiser and position, resumed from the last checkpoint when there is one."""

    def __init__(self, task: TrainingTask, world: int) -> None:
        self.task = task
        self.next_step = 0
        self.records: list[dict[str, Any]] = []
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            with local_copy(task.start) as folder:
                self.model = ColBERT.from_pretrained(folder)
            optimizer_state = None
        else:
            with checkpoint.as_directory() as folder:
                state = json.loads((Path(folder) / "state.json").read_text())
                self.next_step, self.records = state["next_step"], state["records"]
                self.model = ColBERT.from_pretrained(Path(folder) / "model")
                optimizer_state = torch.load(Path(folder) / "optimizer.pt", weights_only=True, map_location="cpu")
        self.model.set_dropout(task.dropout)
        self.device = get_device() if torch.cuda.is_available() else torch.device("cpu")
        self.model.to(self.device).train()
        self.wrapped = prepare_model(self.model) if world > 1 else self.model
        parameters = list(self.wrapped.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=task.weight_decay)
        if optimizer_state is not None:
            self.optimizer.load_state_dict(optimizer_state)

    def save(self, folder: Path) -> None:
        """Write a checkpoint (rank 0 only)."""
        self.model.save(folder / "model")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        state = {"next_step": self.next_step, "records": self.records}
        (folder / "state.json").write_text(json.dumps(state))


def train_worker(config: dict[str, Any]) -> None:
    """What every worker of `ray.train.torch.TorchTrainer` runs; `config` holds the task and the board's name."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    task = TrainingTask.from_dict(config["task"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(task.seed + rank)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    state = WorkerState(task, world)
    reader = InputReader(task, state.model.tokenizer, rank, world)
    step = TrainingStep(state.wrapped, task, "bf16" if task.precision == "bf16" else "fp32", world)
    board = _Progress(config["board"])
    for inputs in reader.stream(state.next_step):
        started = time.monotonic()
        lr = task.learning_rate_at(inputs.step)
        loss, norm = _update(state, step, inputs.to(state.device), lr, world)
        state.next_step = inputs.step + 1
        if inputs.step % task.log_every == 0 or state.next_step == task.steps:
            state.records.append(
                {
                    "step": inputs.step,
                    "loss": loss,
                    "learning_rate": lr,
                    "gradient_norm": norm,
                    "seconds": time.monotonic() - started,
                }
            )
        if rank == 0:
            board.tell(state.next_step, loss)
        if state.next_step == task.steps or state.next_step % task.checkpoint_every == 0:
            _report(state, rank, loss)


def _update(state: WorkerState, step: TrainingStep, inputs: Any, lr: float, world: int) -> tuple[float, float]:
    """One optimiser step; (loss of the whole batch, norm of the gradient before clipping)."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    share = step(inputs)
    if world > 1:
        dist.all_reduce(share)
    loss = float(share)
    norm = float(torch.nn.utils.clip_grad_norm_(state.wrapped.parameters(), state.task.clip_norm))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {inputs.step}: loss {loss}, gradient norm {norm}; lower {state.task.stage}.learning_rate, or set"
            f" {state.task.stage}.precision: fp32"
        )
    state.optimizer.step()
    return loss, norm


def _report(state: WorkerState, rank: int, loss: float) -> None:
    """Every worker calls it; rank 0 brings the checkpoint along."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            state.save(Path(folder))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        name = f"step-{state.next_step:08d}"
        ray.train.report({"step": state.next_step, "loss": loss}, checkpoint=checkpoint, checkpoint_dir_name=name)
