"""The driver's side of training: it places the workers, shows their progress, and keeps the resulting checkpoint."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray

from ckd_ray import __version__
from ckd_ray.distill.left_out import leave_out, left_out
from ckd_ray.distill.metrics import Record, event_bytes, read_parts
from ckd_ray.distill.objectives import CONDITIONAL_KEYS
from ckd_ray.distill.placement import Placement, plan_workers
from ckd_ray.distill.progress_actor import ProgressActor
from ckd_ray.distill.targets import targets_of
from ckd_ray.distill.task import TrainingTask
from ckd_ray.embed.bad_texts import Entry, named, too_many
from ckd_ray.errors import JobError, described, last_line
from ckd_ray.files import filesystem_of, is_local, join, last_part, new_folder, parent
from ckd_ray.model.colbert import read_settings
from ckd_ray.progress import Progress, duration, say
from ckd_ray.ray_util.waiting import WORK_S

# `ray.train.report` blocks for one period of the controller's polling; two seconds by default is most of a short run.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

# The actor that is asked runs on this node, and may have died with Ray.
_TELL_S = 30.0


@dataclass(frozen=True)
class TrainingOutcome:
    """The result of a training.

    Attributes:
        metrics: one record every `log_every` steps (step, loss, learning_rate, ...).
        workers: their number at the end.
        steps: the steps taken, which are fewer than configured when training stopped early.
        weights: which checkpoint is the result, `best` or `last`.
        kept_step: the steps taken before that checkpoint.
        best: the best measure on dev; None without measurements.
        score_scale: the divisor of the scores (`ckd_ray.distill.scale`).
        set_aside: the passages that were left out (`ckd_ray.distill.left_out`).
    """

    metrics: list[Record]
    workers: int
    steps: int
    weights: str
    kept_step: int
    best: float | None
    score_scale: float | None
    set_aside: list[Entry]


def fit(
    task: TrainingTask,
    *,
    out: str,
    workers: int | str = "auto",
    max_failures: int = 3,
    callbacks: Sequence[Any] = (),
    placement: Placement | None = None,
    threads: int | None = None,
    actor_name: str | None = None,
    listener: Callable[[list[Record]], None] | None = None,
) -> TrainingOutcome:
    """Train, and put the resulting checkpoint at `out`.

    Called again after a crash, training resumes from the last checkpoint. The caller removes `task.checkpoints` when
    the result is safe.

    Args:
        workers: a number, `2-8` for elastic training, or `auto`; see `plan_workers`.
        max_failures: how often workers are started again after one died; a diverged loss or broken input ends training
            at once. When they fail twice in a row at one step, its texts are tried. With those left out on which the
            encoder fails, `task.max_bad` of them at most, training goes on as if nothing had failed.
        callbacks: of `ray.train.UserCallback`, such as other loggers.
        placement: instead of `workers`, for one of several trainings that share the cluster.
        threads: CPU threads of a worker; None: the workers of a node share its cores.
        actor_name: the name of the `ProgressActor`, through which others may end this training early; the last
            checkpoint is then the result.
        listener: is told of the records while training runs, each once, in the order of the steps; those that an
            earlier command has kept are left out.

    Raises:
        UserError: the workers do not fit the cluster.
        JobError: training failed; the cause is in the message.
    """
    placement = placement or plan_workers(workers, task.settings.batch_size, task.stage)
    name = actor_name or f"ckd-ray-training-{uuid.uuid4().hex[:8]}"
    actor = ProgressActor.start(name)
    metrics = join(task.checkpoints, "metrics")
    config = {"task": task.to_dict(), "actor": name, "metrics": metrics, "threads": threads}
    config["stoppable"] = actor_name is not None
    before = read_parts(metrics, task.settings.steps) if listener else []
    listening = _Listening(listener, before[-1]["step"] if before else -1)
    try:
        with _progress(task, actor, listening):
            result = _train(task, placement, config, max_failures, callbacks, actor)
    finally:
        ray.kill(actor)
    outcome = _take(task, result, metrics, out)
    listening.tell(outcome.metrics)
    return outcome


class _Listening:
    """Tells a listener of each record after step `last` once."""

    def __init__(self, listener: Callable[[list[Record]], None] | None, last: int) -> None:
        self._listener, self._last = listener, last

    def ask(self, actor: Any) -> None:
        """Tell of what the actor has. Raises what Ray raises when the actor does not answer."""
        if self._listener:
            self.tell(ray.get(actor.records_after.remote(self._last), timeout=5))

    def tell(self, records: Sequence[Record]) -> None:
        """Tell of those that are new."""
        new = [record for record in records if record["step"] > self._last]
        if self._listener and new:
            self._last = new[-1]["step"]
            self._listener(new)


def _trainer(
    task: TrainingTask, placement: Placement, config: dict[str, Any], max_failures: int, callbacks: Sequence[Any]
) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from ckd_ray.distill.worker import KEEP, FailureNotice, train_worker

    workers: Any = placement.num_workers  # the stubs know no pairs
    notice: Any = FailureNotice(config["actor"])  # nor callbacks
    checkpoints = parent(task.checkpoints)
    fs, path = filesystem_of(checkpoints)
    # Ray never removes the latest checkpoint, from which training resumes; it keeps the best one as well.
    keep = CheckpointConfig(num_to_keep=1)
    if task.settings.evaluate_every:
        keep = CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=KEEP, checkpoint_score_order="max")
    return TorchTrainer(
        train_worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if placement.use_gpu else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=placement.use_gpu, resources_per_worker=placement.resources
        ),
        run_config=RunConfig(
            name=last_part(task.checkpoints),
            storage_path=path,
            storage_filesystem=None if is_local(checkpoints) else fs,
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=keep,
            callbacks=[*callbacks, notice],
        ),
    )


def _train(
    task: TrainingTask,
    placement: Placement,
    config: dict[str, Any],
    max_failures: int,
    callbacks: Sequence[Any],
    actor: Any,
) -> Any:
    """Ray's result of the training, begun again when texts were set aside. Raises JobError."""
    left = max_failures
    while True:
        if bad := left_out(task):
            say(f"{task.stage}: left out of training, as the encoder fails on them every time: {named(bad)}")
        result, why = _run(_trainer(task, placement, config, left, callbacks), task, actor)
        state = _told(actor)
        if why is None and not state["stuck"]:
            if result.checkpoint is None:
                raise JobError(f"{task.stage}: training ended without a checkpoint")
            return result
        if _set_aside(task, state["step"], placement):
            left = max_failures
        elif why is not None:
            raise JobError(f"{task.stage}: training failed: {why}")
        else:
            left -= state["failures"]
        ray.get(actor.go_on.remote(), timeout=_TELL_S)


def _set_aside(task: TrainingTask, step: int, placement: Placement) -> bool:
    """Find the texts after `step` finished steps on which the encoder fails, and leave them out from here on. Returns
    whether there are any.

    Raises:
        JobError: they are queries, or more passages than may be left out; names them.
    """
    from ckd_ray.distill.suspects import PASSAGES, find_bad

    present = ray.cluster_resources()
    if any(present.get(name, 0.0) < needed for name, needed in placement.resources.items()):
        return False  # the machines themselves are lost
    say(f"{task.stage}: the workers fail at step {step}; its texts are tried, to find one on which the encoder fails")
    try:
        found = find_bad(task, step, placement)
    except ray.exceptions.RayError as error:
        say(f"{task.stage}: the texts could not be tried: {described(error)}")
        return False
    passages = found.pop(PASSAGES, [])
    for queries, entries in found.items():
        raise JobError(f"{task.stage}: {too_many(queries, entries, 0)}")
    if not passages:
        return False
    bad = [*left_out(task), *passages]
    if len(bad) > task.max_bad:
        raise JobError(f"{task.stage}: {too_many(PASSAGES, bad, task.max_bad)}")
    leave_out(task, bad)
    return True


def _run(trainer: Any, task: TrainingTask, actor: Any) -> tuple[Any, str | None]:
    """(Ray's result, None); or (None, the cause) when the workers failed, perhaps because of a text.

    Raises:
        JobError: training failed for another reason.
    """
    from ray.train.v2.api.exceptions import TrainingFailedError

    before = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
        error = result.error
    except SystemExit as interrupted:  # how Ray Train's own Ctrl-C handler leaves, after it has stopped the workers
        cause = _told(actor)["cause"]
        if cause is not None:  # it was not the user (`_give_up`)
            raise JobError(f"{task.stage}: training failed: {cause}") from interrupted
        raise KeyboardInterrupt from interrupted
    except TrainingFailedError as failed:
        result, error = None, failed
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
    # What the workers have told the actor, else the message of the error, without Ray's frames.
    cause = _told(actor)["cause"]
    failures = getattr(error, "worker_failures", None)
    if cause is None and failures:
        return None, last_line(next(iter(failures.values())))
    if cause is not None or error is not None:
        raise JobError(f"{task.stage}: training failed: {cause or last_line(error)}") from error
    return result, None


def _told(actor: Any) -> dict[str, Any]:
    """The state of the progress actor; that of a new actor when it is lost."""
    try:
        state: dict[str, Any] = ray.get(actor.state.remote(), timeout=_TELL_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        state = ProgressActor().state()
    return state


@contextmanager
def _progress(task: TrainingTask, actor: Any, listening: _Listening) -> Iterator[None]:
    """Show the progress that the actor knows, and tell of its records, while `fit` blocks the main thread."""
    ended = threading.Event()

    main = threading.current_thread() is threading.main_thread()

    def follow() -> None:
        started, seen, since = False, -1, time.monotonic()
        with Progress(task.stage, task.settings.steps, "steps") as progress:
            while not ended.wait(0.5):
                try:
                    state = ray.get(actor.state.remote(), timeout=5)
                    listening.ask(actor)
                except (ray.exceptions.RayError, ConnectionError):
                    continue
                step = state["step"]
                if step and not started:
                    # The rate counts from the first finished step: before it the workers start.
                    progress.count_from(step)
                    started = True
                progress.note = f"loss {state['loss']:.4f}"
                if step:
                    progress.reach(step)
                if step != seen:
                    seen, since = step, time.monotonic()
                elif time.monotonic() - since > WORK_S:
                    _give_up(actor, step, main)
                    return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)


def _give_up(actor: Any, step: int, main: bool) -> None:
    """Ends a training in which no step has been finished for hours: `fit` itself would wait for ever."""
    cause = f"no step has been finished for {duration(WORK_S)}, after step {step}; its last checkpoint is kept"
    with suppress(ray.exceptions.RayError):
        ray.get(actor.fail.remote(cause), timeout=_TELL_S)
    if main:
        os.kill(os.getpid(), signal.SIGINT)  # Ray Train then stops its workers
    else:  # a trial, which has this process for itself
        os._exit(1)


def _take(task: TrainingTask, result: Any, metrics: str, out: str) -> TrainingOutcome:
    """Put the model of the best checkpoint (when dev was measured) or of the last one at `out`, with `training.json`,
    `metrics.jsonl` and `tensorboard/`, and the last weights in `last/` when they are not the result."""
    from ckd_ray.distill.worker import KEEP

    name = "result" if task.settings.untrained_share else "average" if task.settings.ema else "model"
    with new_folder(out) as target:
        with result.checkpoint.as_directory() as folder:
            position = json.loads((Path(folder) / "state.json").read_text())
            if not position["finished"]:
                raise JobError(f"{task.stage}: training ended at step {position['next_step']} of {task.settings.steps}")
            kept, weights = position["best_step"], "best"
            if kept is None or kept == position["next_step"]:
                kept = position["next_step"]
                weights = "last" if position["best_step"] is None else "best"
                shutil.copytree(Path(folder) / name, target, dirs_exist_ok=True)
            else:
                shutil.copytree(Path(folder) / name, Path(target) / "last")
        if kept != position["next_step"]:
            best, _ = max(result.best_checkpoints, key=lambda found: found[1][KEEP])
            with best.as_directory() as folder:
                shutil.copytree(Path(folder) / name, target, dirs_exist_ok=True)
        records = read_parts(metrics, position["next_step"])
        settings = read_settings(target)
        outcome = TrainingOutcome(
            metrics=records,
            workers=records[-1]["workers"],
            steps=position["next_step"],
            weights=weights,
            kept_step=kept,
            best=position["best"],
            score_scale=settings.score_scale,
            set_aside=left_out(task),
        )
        (Path(target) / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        events = Path(target) / "tensorboard"
        events.mkdir()
        (events / "events.out.tfevents.0.ckd-ray").write_bytes(event_bytes(task.stage, records))
        description = _description(task, outcome, settings.similarity)
        (Path(target) / "training.json").write_text(json.dumps(description, indent=2) + "\n")
    return outcome


def _description(task: TrainingTask, outcome: TrainingOutcome, similarity: str) -> dict[str, Any]:
    """`training.json`: how the weights were trained, and the loss and its scales in words."""
    unread = CONDITIONAL_KEYS - task.objective.keys(task.distillation) if task.distillation else frozenset()
    of_task = {k: v for k, v in task.to_dict().items() if k not in ("run", "start", "teacher", "settings", "max_bad")}
    settings = {**task.settings.model_dump(mode="json", exclude=set(unread)), **of_task}
    loss = f", loss {task.distillation.loss}" if task.distillation and task.objective.has_teacher else ""
    result = {k: v for k, v in asdict(outcome).items() if k != "metrics"}
    return {
        "settings": settings,
        "result": {**result, "measure": "mrr@10" if outcome.best is not None else None},
        "similarity": similarity,
        "score_scale": outcome.score_scale,
        "targets": targets_of(outcome.metrics),
        "loss": f"{task.objective.formula}{loss}; mean over the batch's queries; scores are sums over query rows, the "
        "student's divided by score_scale, the teacher's by temperature; there is no temperature^2 factor",
        "versions": {
            "ckd_ray": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "ray")},
        },
    }
