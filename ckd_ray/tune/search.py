"""The second pass: trials, run by Ray Tune. Each is a real distillation through Ray Train; ASHA stops weak ones.

Ray Tune asks `_Searcher` for the next trial and reports events to `_Recorder`. Both keep their state in `Records`, and
ASHA learns of earlier trials when a search resumes. The files that Ray itself keeps of a search are deleted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from ckd_ray.config import Config
from ckd_ray.distill.placement import Placement
from ckd_ray.distill.task import TrainingTask
from ckd_ray.errors import JobError, UserError, last_line
from ckd_ray.files import delete, filesystem_of, is_local, join
from ckd_ray.progress import Progress, duration, say, without_secrets
from ckd_ray.ray_util.machines import alive
from ckd_ray.tune.records import Records, State, Trial
from ckd_ray.tune.space import Values, steps_a_measurement
from ckd_ray.tune.suggest import Suggester

METRIC, TIME, CAUSE = "mrr@10", "steps", "cause"
# For the process that follows a trial's training and computes nothing.
_DRIVER_CPUS = 0.01
_WORKER_CPUS = 0.9
_CLUSTER_FAILURES = 3  # how often a trial starts again after its process or node was lost

# Strict metric checking is off because a stopped training ends with a report between two measurements.
_RAY_TUNE_OFF = (
    "TUNE_DISABLE_SIGINT_HANDLER", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_DISABLE_STRICT_METRIC_CHECKING",
)  # fmt: skip

# Maps the number and the values of a trial to its training.
TaskOf = Callable[[int, Values], TrainingTask]


@dataclass(frozen=True)
class TrialPlan:
    """How trials share the cluster: the number at a time, the workers of each, and the CPU threads of a worker."""

    concurrent: int
    placement: Placement
    threads: int | None


def plan_trials(config: Config) -> TrialPlan:
    """Fit the trials to the connected cluster.

    Raises:
        UserError: fewer trials fit than configured.
    """
    t = config.tune
    nodes = [node["Resources"] for node in alive()]
    cpus, gpus = ([node.get(name, 0.0) for node in nodes] for name in ("CPU", "GPU"))
    if sum(gpus) < 1:
        room = sum(int(c / (_WORKER_CPUS + _DRIVER_CPUS) + 1e-9) for c in cpus)
        concurrent = _checked(t.concurrent, min(1, room), room, "one CPU each", cpus, gpus)
        cores = os.cpu_count() or 1
        return TrialPlan(concurrent, Placement(1, 1, False, cpus=_WORKER_CPUS), max(1, cores // concurrent))
    if t.gpus_per_trial < 1:
        each = int(1 / t.gpus_per_trial + 1e-9)
        room = sum(min(int(g) * each, int(c / 0.5)) for g, c in zip(gpus, cpus, strict=True))
        placement = Placement(1, 1, True, gpus=t.gpus_per_trial, cpus=0.45)
    else:
        workers = int(t.gpus_per_trial)
        if workers > config.distill.batch_size:
            raise UserError(
                "more workers than queries in a batch",
                where="tune.gpus_per_trial",
                expected=f"at most distill.batch_size ({config.distill.batch_size})",
                found=str(workers),
            )
        slots = sum(min(int(g), int(c)) for g, c in zip(gpus, cpus, strict=True))
        room = slots // workers
        placement = Placement(workers, workers, True, cpus=_WORKER_CPUS)
    wanted = min(room, t.trials)
    concurrent = _checked(t.concurrent, wanted, room, f"{t.gpus_per_trial:g} GPU each", cpus, gpus)
    return TrialPlan(concurrent, placement, None)


def _checked(asked: int | str, wanted: int, room: int, each: str, cpus: list[float], gpus: list[float]) -> int:
    count = wanted if asked == "auto" else int(asked)
    if room < 1 or count > room:
        raise UserError(
            "the trials do not fit the cluster",
            where="tune.concurrent",
            expected=f"at most {room}, {each}",
            found=f"{asked}; the cluster has {sum(cpus):g} CPU and {sum(gpus):g} GPU (nodes: {len(cpus)})",
            fix="set tune.concurrent: auto, lower tune.gpus_per_trial, or add nodes",
        )
    return count


def run_trial(config: dict[str, Any]) -> None:
    """One trial, in a process of Ray Tune: the distillation of `config["task"]`, whose student is deleted.

    A trial whose process was lost resumes from its last checkpoint. One whose training failed would fail again, so it
    reports the cause and ends.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    from ckd_ray.distill.trainer import fit
    from ckd_ray.progress import set_quiet

    set_quiet(True)
    task = TrainingTask.from_dict(config["task"])
    try:
        fit(
            task,
            out=config["out"],
            max_failures=config["max_failures"],
            callbacks=[TuneReportCallback()],
            placement=Placement(**config["placement"]),
            threads=config["threads"],
            actor_name=actor_name(task),
        )
        delete(task.checkpoints)
    except (JobError, UserError) as error:
        tune.report({CAUSE: str(error)})
    delete(config["out"])


def actor_name(task: TrainingTask) -> str:
    """The name of the progress actor of a trial's training."""
    return f"ckd-ray-trial-{task.fingerprint[:16]}"


def search(
    config: Config,
    folder: str,
    records: Records,
    suggester: Suggester,
    task_of: TaskOf,
    ended: Callable[[Trial], None],
) -> None:
    """Run the trials that have not ended, and call `ended` with each that has. Ray Tune writes into `folder`. Ray must
    be connected.

    Raises:
        UserError: the trials do not fit the cluster.
        JobError: no trial could be finished.
    """
    t = config.tune
    plan = plan_trials(config)
    waiting = sum(trial.state in ("running", "failed") for trial in records.trials.values())
    left = max(0, suggester.trials - len(records.trials)) + waiting
    if not left:
        return
    if suggester.trials < t.trials:
        say(f"tune: the space has {suggester.trials} combinations; each is tried once")
    table = _Table(records, suggester.default)
    steps = config.distill.steps
    every = steps_a_measurement(config)
    searcher = _Searcher(records, suggester, task_of, config, plan, folder)
    asha = _GentleASHA(
        searcher,
        time_attr=TIME,
        metric=METRIC,
        mode="max",
        max_t=steps + 1,  # a trial that takes all its steps ends without ASHA
        grace_period=every * t.grace,
        reduction_factor=t.reduction,
    )
    _replay(asha, records)
    measured = f"measured every {every} of {steps} steps"
    say(f"tune: {left} of {suggester.trials} trials, {plan.concurrent} at a time; {measured}")
    table.head()
    progress = Progress("tune", left, "trials")

    def and_count(trial: Trial) -> None:
        ended(trial)
        progress.advance(1)

    at = join(folder, "ray")
    delete(at)
    fs, path = filesystem_of(at)
    tuner = tune.Tuner(
        tune.with_resources(run_trial, {"cpu": _DRIVER_CPUS}),
        tune_config=tune.TuneConfig(
            search_alg=searcher, scheduler=asha, num_samples=left, max_concurrent_trials=plan.concurrent
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=path,
            storage_filesystem=None if is_local(at) else fs,
            callbacks=[_Recorder(records, searcher, table, steps, and_count), _NoTables()],
            failure_config=tune.FailureConfig(max_failures=_CLUSTER_FAILURES),
            verbose=0,
        ),
    )
    with _own_output(), progress:
        tuner.fit()
    delete(at)
    for task in searcher.tasks.values():  # of trials that failed
        delete(task.checkpoints)
    if records.best() is None:
        causes = {trial.cause for trial in records.trials.values() if trial.cause}
        raise JobError(f"tune: no trial was finished: {'; '.join(sorted(causes)) or 'all were stopped'}")


def trial_task(base: TrainingTask, config: Config, fingerprint: str, labels: str) -> TrainingTask:
    """`base` with the values of a trial's configuration and the search's measurements on dev."""
    every = steps_a_measurement(config)
    measured: dict[str, Any] = {"evaluate_every": every, "checkpoint_every": every, "patience": 0}
    measured |= {"dev_queries": config.tune.dev_queries, "dev_passages": config.tune.dev_passages}
    settings = config.distill.model_copy(update=measured)
    return replace(base, fingerprint=fingerprint, labels=labels, settings=settings)


class _Searcher(Searcher):
    """Suggests trials: interrupted ones first, then new ones."""

    def __init__(
        self, records: Records, suggester: Suggester, task_of: TaskOf, config: Config, plan: TrialPlan, folder: str
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.records, self.suggester, self.task_of = records, suggester, task_of
        self.plan, self.folder, self.max_failures = plan, folder, config.distill.max_failures
        self.again = [t for t in records.trials.values() if t.state in ("running", "failed")]
        self.numbers: dict[str, int] = {}
        self.tasks: dict[int, TrainingTask] = {}

    def suggest(self, trial_id: str) -> Any:
        if self.again:
            trial = self.again.pop(0)
            trial.state, trial.cause = "running", None
        else:
            number = next(i for i in range(len(self.records.trials) + 1) if i not in self.records.trials)
            if number >= self.suggester.trials:
                return Searcher.FINISHED
            trial = Trial(number, self.suggester.values(number, self.records.ended()))
        self.records.write(trial)
        self.numbers[trial_id] = trial.number
        task = self.tasks[trial.number] = self.task_of(trial.number, trial.values)
        return {
            "task": task.to_dict(),
            "out": join(self.folder, f"student-{trial.number:05d}"),
            "placement": asdict(self.plan.placement),
            "threads": self.plan.threads,
            "max_failures": self.max_failures,
        }

    def stop(self, trial_id: str) -> None:
        """Ask a trial to end."""
        number = self.numbers.get(trial_id)
        if number is not None:
            with suppress(ValueError):  # it has ended, and its actor with it
                ray.get_actor(actor_name(self.tasks[number])).request_stop.remote()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """`_Recorder` records it."""

    def save(self, checkpoint_path: str) -> None:
        """`Records` hold all state."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class _GentleASHA(ASHAScheduler):
    """ASHA that asks a weak trial to end instead of killing it.

    A killed trial would leave behind the placement group of its Ray Train workers, and the next trial would wait
    forever for their CPUs.
    """

    def __init__(self, searcher: _Searcher, **settings: Any) -> None:
        super().__init__(**settings)
        self._searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """As `ASHAScheduler`, but the answer is always CONTINUE."""
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            self._searcher.stop(trial.trial_id)
        return TrialScheduler.CONTINUE


class _Recorder(tune.Callback):
    """Records the events of the trials, and shows them."""

    def __init__(
        self, records: Records, searcher: _Searcher, table: _Table, steps: int, ended: Callable[[Trial], None]
    ) -> None:
        self.records, self.searcher, self.table, self.steps, self.ended = records, searcher, table, steps, ended

    def _of(self, trial: Any) -> Trial | None:
        number = self.searcher.numbers.get(trial.trial_id)
        return None if number is None else self.records.trials[number]

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
        mine = self._of(trial)
        if mine is not None and result.get(CAUSE):
            mine.cause = without_secrets(str(result[CAUSE]))
        if mine is None or METRIC not in result or result[TIME] <= mine.steps:
            return  # a training that resumes after a loss may report a step again
        mine.seconds += float(result.get("time_this_iter_s", 0.0))
        mine.measurements.append([int(result[TIME]), float(result[METRIC]), round(mine.seconds, 1)])
        self.records.write(mine)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        mine = self._of(trial)
        if mine is not None:
            state: State = "failed" if mine.cause else "finished" if mine.steps >= self.steps else "stopped"
            self._end(mine, state, mine.cause)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        mine = self._of(trial)
        if mine is not None:
            error = trial.get_error()
            cause = last_line(getattr(error, "cause", None) or error) if error else "no message"
            self._end(mine, "failed", cause)

    def _end(self, mine: Trial, state: State, cause: str | None) -> None:
        self.records.end(mine, state, cause)
        self.table.row(mine)
        self.ended(mine)


class _NoTables(TrialProgressCallback):
    """Replaces Ray's own callback, which prints even with `verbose=0`."""

    def _print(self, msg: str) -> None:
        pass


def _replay(asha: ASHAScheduler, records: Records) -> None:
    """Tell a new scheduler the measurements of earlier trials, in the order of their ends."""
    order = sorted(records.trials.values(), key=lambda t: (t.ended is None, t.ended or 0, t.number))
    for trial in order:
        known: Any = SimpleNamespace(trial_id=f"earlier-{trial.number}")
        asha.on_trial_add(None, known)  # type: ignore[arg-type]
        for steps, value, _ in trial.measurements:
            asha.on_trial_result(None, known, {TIME: int(steps), METRIC: value})  # type: ignore[arg-type]


@contextmanager
def _own_output() -> Iterator[None]:
    """A context in which Ctrl-C ends the search like any other command, and Ray Tune writes no logs of its own."""
    names = dict.fromkeys(_RAY_TUNE_OFF, "1") | {"RAY_AIR_NEW_OUTPUT": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Table:
    """Prints a head, and a row for every trial when it ends."""

    def __init__(self, records: Records, values: Values) -> None:
        self.records = records
        self.names = {key: key.partition(".")[2] for key in values}
        self.widths = {key: max(len(name), 9) for key, name in self.names.items()}

    def head(self) -> None:
        names = "  ".join(f"{name:>{self.widths[key]}}" for key, name in self.names.items())
        say(f"  trial  {names}     steps   MRR@10     time")
        for trial in self.records.ended():
            self.row(trial)

    def row(self, trial: Trial) -> None:
        values = "  ".join(f"{shown(trial.values[key]):>{self.widths[key]}}" for key in self.names)
        best = "" if trial.best is None else f"{trial.best:.4f}"
        time = duration(trial.seconds)
        leader = self.records.best()
        mark = " <- best" if leader is not None and leader.number == trial.number else ""
        note = f"  {trial.state}: {trial.cause}" if trial.cause else ("  stopped" if trial.state == "stopped" else mark)
        say(f"  {trial.number:>5}  {values}  {trial.steps:>8}  {best:>7}  {time:>7}{note}")


def shown(value: Any) -> str:
    """A value in a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
