"""The training loop of one Ray Train worker.

A checkpoint is a folder: `model/` (a ColBERT checkpoint), `average/` (the same with the moving average of the weights,
when `ema` is on), `result/` (averaged with the untrained encoder, where that has a share), `optimizer.pt` (read with
weights_only) and `state.json` (a `Position`). Batches, dropout, warm-up and decay depend on the step number alone, so a
resumed training needs nothing else.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import get_device, prepare_model

from ckd_ray.distill.averages import MovingAverage, UntrainedAverage
from ckd_ray.distill.dev import DevMeasure
from ckd_ray.distill.inputs import InputReader, StepInputs
from ckd_ray.distill.metrics import Record, write_part
from ckd_ray.distill.progress_actor import ProgressReporter
from ckd_ray.distill.scale import measured_scale
from ckd_ray.distill.step import BatchEncoder, TrainingStep
from ckd_ray.distill.task import TrainingTask
from ckd_ray.errors import JobError, UserError
from ckd_ray.files import filesystem_of, is_local, join, local_copy, upload_folder
from ckd_ray.model import ColBERT
from ckd_ray.model.encoder import Precision
from ckd_ray.model.recompute import recompute_activations

# A new attempt would fail in the same way: bad input, a broken shard, a diverged loss, too large a batch for the GPU.
FINAL_ERRORS = (UserError, JobError, FloatingPointError, torch.OutOfMemoryError)
# Ray keeps the checkpoint with the highest value of this metric besides the last: the measure of a new best, else -1.
KEEP, NOT_BEST = "keep", -1.0
_STORE_WITHIN_S = 1800.0


@dataclass
class Position:
    """How far training is (`state.json`).

    Attributes:
        best: the best measure on dev so far.
        best_step: the steps taken before it.
        worse: measurements since then.
        pool: the passages of the dev measurement.
        finished: all steps are done, or training has stopped early.
    """

    next_step: int = 0
    best: float | None = None
    best_step: int | None = None
    worse: int = 0
    pool: list[int] | None = None
    finished: bool = False


class WorkerState:
    """Model, optimiser and position, resumed from the last checkpoint when there is one."""

    def __init__(self, task: TrainingTask, world: int) -> None:
        self.task = task
        self.position = Position()
        averages: list[torch.Tensor] | None = None
        optimizer_state = None
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            with local_copy(task.start) as folder:
                self.model = ColBERT.from_pretrained(folder)
        else:
            with checkpoint.as_directory() as folder:
                self.position = Position(**json.loads((Path(folder) / "state.json").read_text()))
                self.model = ColBERT.from_pretrained(Path(folder) / "model")
                optimizer_state = torch.load(Path(folder) / "optimizer.pt", weights_only=True, map_location="cpu")
                if task.settings.ema:
                    averages = _weights(ColBERT.from_pretrained(Path(folder) / "average"))
        self.model.set_dropout(task.dropout)
        if task.settings.gradient_checkpointing:
            recompute_activations(self.model, f"{task.stage}.gradient_checkpointing")
        self.device = get_device() if torch.cuda.is_available() else torch.device("cpu")
        self.model.to(self.device).train()
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        encoder = BatchEncoder(self.model)
        self.encoder = prepare_model(encoder, parallel_strategy_kwargs=options) if world > 1 else encoder
        self.parameters = list(self.encoder.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=task.settings.learning_rate, weight_decay=task.settings.weight_decay, fused=True
        )
        if optimizer_state is not None:
            self.optimizer.load_state_dict(optimizer_state)
        self.average = MovingAverage(_weights(self.model), task.settings.ema, averages) if task.settings.ema else None
        self.with_untrained: UntrainedAverage | None = None
        if task.settings.untrained_share:
            assert task.untrained is not None, "untrained_share needs the untrained encoder"
            with local_copy(task.untrained) as folder:
                untrained = ColBERT.from_pretrained(folder).backbone
            self.with_untrained = UntrainedAverage(
                list(self.model.backbone.parameters()), list(untrained.parameters()), task.settings.untrained_share
            )

    @contextmanager
    def as_result(self) -> Iterator[None]:
        """A context in which the model has the weights of the result: averaged over the steps where `ema` is on, then
        with the untrained encoder where it has a share."""
        with ExitStack() as stack:
            for average in (self.average, self.with_untrained):
                if average is not None:
                    stack.enter_context(average.in_place())
            yield

    def save(self, folder: Path) -> None:
        """Write a checkpoint (rank 0 only)."""
        self.model.save(folder / "model")
        if self.average is not None:
            with self.average.in_place():
                self.model.save(folder / "average")
        if self.with_untrained is not None:
            with self.as_result():
                self.model.save(folder / "result")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps(asdict(self.position)))


def _weights(model: ColBERT) -> list[torch.Tensor]:
    return list(model.parameters())


def train_worker(config: dict[str, Any]) -> None:
    """The function that every worker of `ray.train.torch.TorchTrainer` runs.

    A worker reports an error that every attempt would meet to the progress actor. The workers of later attempts then
    return at once; otherwise Ray would start the training `max_failures` more times. They also return at once when two
    attempts in a row fail at about the same step. The driver then tries the texts there.

    Args:
        config: the `task`, the name of the progress `actor`, the folder of the `metrics`, the CPU `threads`, and
            whether training is `stoppable` through the actor.
    """
    reporter = ProgressReporter(config["actor"])
    if reporter.is_over():
        return
    try:
        _Loop(TrainingTask.from_dict(config["task"]), reporter, config).run()
    except FINAL_ERRORS as error:
        stage = config["task"]["stage"]
        advice = f"raise {stage}.accumulate, or set {stage}.gradient_checkpointing: true: "
        reporter.fail((advice if isinstance(error, torch.OutOfMemoryError) else "") + str(error))
        if not isinstance(error, FloatingPointError):
            raise  # the other workers may not have the error, and wait for this one


class FailureNotice(ray.train.UserCallback):
    """Tells the progress actor of this name that an attempt has failed; runs in Ray's controller."""

    def __init__(self, actor: str) -> None:
        self.actor = actor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Returns before the workers are started again, and so before they ask the actor."""
        with suppress(ValueError):
            ray.get_actor(self.actor).attempt_failed.remote()


class _Loop:
    """The steps of one worker, from the last checkpoint on."""

    def __init__(self, task: TrainingTask, reporter: ProgressReporter, config: dict[str, Any]) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        torch.set_num_threads(config["threads"] or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        self.task, self.reporter, self.metrics, self.stoppable = task, reporter, config["metrics"], config["stoppable"]
        self.state = WorkerState(task, self.world)
        self.position = self.state.position
        model, device = self.state.model, self.state.device
        precision: Precision = "bf16" if task.precision == "bf16" else "fp32"
        self.reader = InputReader(task, model.tokenizer, self.rank, self.world, device)
        scale = self._scale(precision)
        frozen = None
        if task.recomputes_teacher:
            with local_copy(task.teacher or task.start) as folder:
                frozen = ColBERT.from_pretrained(folder).to(device)
        self.step = TrainingStep(self.state.encoder, task, precision, self.world, self.rank, frozen, scale)
        self.dev = None
        if task.settings.evaluate_every and not self.position.finished:
            self.dev = DevMeasure(
                task, model, rank=self.rank, world=self.world, device=device, precision=precision,
                pool=self.position.pool, left_out=self.reader.left_out,
            )  # fmt: skip
            self.position.pool = self.dev.pool_P.tolist()
        self.records: list[Record] = []  # since the last checkpoint
        self._checkpoint: Path | None = None  # where the last one was written before it went to storage

    def _scale(self, precision: Precision) -> float:
        """The score scale: as configured, or that of the starting model, or measured. It becomes a setting of the
        model, so that its checkpoints and its students have it."""
        model, chosen = self.state.model, self.task.settings.score_scale
        scale = model.settings.score_scale if chosen == "auto" else chosen
        if scale is None:
            scale = measured_scale(
                model, self.reader.collection, self.reader.positives,
                trained=self.task.stage != "teacher", seed=self.task.seed, precision=precision,
                doc_maxlen=self.task.settings.doc_maxlen, left_out=self.reader.left_out,
            )  # fmt: skip
            if self.world > 1:  # workers on different processors may differ in the last digits
                agreed = torch.tensor(scale, dtype=torch.float64, device=self.state.device)
                torch.distributed.broadcast(agreed, 0)
                scale = float(agreed)
        model.settings = replace(model.settings, score_scale=scale)
        return scale

    def run(self) -> None:
        """Train to the last step, until dev has not improved for `patience` measurements, or until a stop request."""
        if self.position.finished:
            return
        settings = self.task.settings
        if self.rank == 0:
            self.reporter.begin(self.position.next_step)
        for inputs in self.reader.stream(self.position.next_step):
            record = self._update(inputs)
            improved = self._measure(record)
            done = self.position.next_step
            last = done == settings.steps or bool(settings.patience and self.position.worse >= settings.patience)
            last = last or self._stop_requested()
            self.position.finished = last
            kept = last or inputs.step % settings.log_every == 0 or "mrr@10" in record
            reported = last or improved or done % settings.checkpoint_every == 0
            if kept or reported:
                record |= self._targets()  # only here, because reading numbers from the device makes a step wait
            if kept:
                self.records.append(record)
            if self.rank == 0:
                self.reporter.report(done, record["loss"], record if kept else None)
            if reported:
                self._report(record, improved)
            if last:
                break

    def _update(self, inputs: StepInputs) -> Record:
        """One optimiser step, and its record. `gradient_norm` is the norm before clipping."""
        started, state, task = time.monotonic(), self.state, self.task
        rate = task.learning_rate_at(inputs.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        loss = float(self.step(inputs.to(state.device)))
        norm = float(torch.nn.utils.clip_grad_norm_(state.parameters, task.settings.clip_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {inputs.step}: loss {loss}, gradient norm {norm}; lower {task.stage}.learning_rate, or set"
                f" {task.stage}.precision: fp32"
            )
        state.optimizer.step()
        if state.average is not None:
            state.average.update(inputs.step)
        self.position.next_step = inputs.step + 1
        return {
            "step": inputs.step,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "seconds": time.monotonic() - started,
            "workers": self.world,
            "time": time.time(),
        }

    def _targets(self) -> Record:
        """Means over the queries of the target's entropy in nats, of its share of the highest possible entropy, and of
        the label's probability."""
        rows = self.step.rows
        if rows is None or not len(rows.loss_B):
            return {}
        highest = float(rows.uniform_B.mean())
        entropy = float(rows.entropy_B.mean())
        return {
            "target_entropy": entropy,
            "target_entropy_share": entropy / highest if highest > 0 else 0.0,
            "label_mass": float(rows.mass_B.mean()),
        }

    def _stop_requested(self) -> bool:
        """The same answer in all workers, who must end after the same step."""
        if not self.stoppable:
            return False
        stop = torch.tensor(float(self.rank == 0 and self.reporter.stop_requested()), device=self.state.device)
        if self.world > 1:
            torch.distributed.broadcast(stop, 0)
        return bool(stop)

    def _measure(self, record: Record) -> bool:
        """Measure dev when it is due. Returns whether it is better than ever before."""
        position, every = self.position, self.task.settings.evaluate_every
        if self.dev is None or (position.next_step % every and position.next_step != self.task.settings.steps):
            return False
        with self.state.as_result():
            found = record["mrr@10"] = self.dev()
        if position.best is not None and found <= position.best:
            position.worse += 1
            return False
        position.best, position.best_step, position.worse = found, position.next_step, 0
        return True

    def _report(self, record: Record, improved: bool) -> None:
        """Called by every worker; rank 0 adds the checkpoint, and writes the metrics since the last one. The checkpoint
        is written to this machine's disk, and to storage while training goes on."""
        metrics = {name: value for name, value in record.items() if name != "time"}
        metrics["steps"] = self.position.next_step
        metrics[KEEP] = record["mrr@10"] if improved else NOT_BEST
        checkpoint = None
        if self.rank == 0:
            write_part(self.metrics, self.task.stage, self.position.next_step, self.records)
            self._wait_until_stored()
            self._checkpoint = Path(tempfile.mkdtemp(prefix="ckd-ray-checkpoint-"))
            self.state.save(self._checkpoint)
            checkpoint = ray.train.Checkpoint.from_directory(self._checkpoint)
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_dir_name=f"step-{self.position.next_step:08d}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=None if is_local(self.task.checkpoints) else self._upload,
            delete_local_checkpoint_after_upload=True,
        )
        self.records = []

    def _upload(self, checkpoint: Any, name: str) -> Any:
        """Upload a checkpoint. Ray's own upload does not report a file that failed (see `files/atomic.py`)."""
        stored = join(self.task.checkpoints, name)
        upload_folder(checkpoint.path, stored)
        fs, path = filesystem_of(stored)
        return ray.train.Checkpoint(path=path, filesystem=fs)

    def _wait_until_stored(self) -> None:
        """Wait for the checkpoint before this one, so that the disk here holds one at a time. Ray removes its folder
        when it is stored, and ends the attempt when it cannot be."""
        until = time.monotonic() + _STORE_WITHIN_S
        while self._checkpoint is not None and self._checkpoint.exists():
            if time.monotonic() > until:
                raise JobError(
                    f"a checkpoint could not be stored within {_STORE_WITHIN_S:.0f} s: the storage of the run does not"
                    " answer; give the same command again, and training goes on from the one before it"
                )
            time.sleep(0.05)
