"""The trackers of a run: each in a thread of its own, so that a slow server holds nothing up.

A tracker begins with the first value that it is given. Its first failure ends it: one line says so, and the run goes
on.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ckd_ray.config.schema import TrackingConfig
from ckd_ray.errors import first_line
from ckd_ray.files import exists, join, read_json, write_json_atomic
from ckd_ray.progress import say
from ckd_ray.tracking.run import Status, TrackedRun, Tracker

# Name -> module of ours, class, module of the library, what to install.
_KINDS = {
    "tensorboard": ("to_tensorboard", "TensorBoard", "tensorboardX", "tensorboardX"),
    "wandb": ("to_wandb", "WeightsAndBiases", "wandb", "wandb"),
    "mlflow": ("to_mlflow", "MLflow", "mlflow", "mlflow-skinny"),
}
_PATIENCE_S = 60.0  # for a tracker at the end of a run
_failed: set[str] = set()  # the trackers that the present command goes on without


def forget_failures() -> None:
    """Try every tracker again; a command or a call begins."""
    _failed.clear()


def _installed(module: str) -> bool:
    """Whether the module is installed. A folder of that name, such as `wandb/` of an earlier run, does not count."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def _give_up(name: str, why: str) -> None:
    if name not in _failed:
        _failed.add(name)
        say(f"tracking: {name}: {why}; the run goes on without it")


class Tracking:
    """The trackers of a run. Without trackers every method does nothing.

    Args:
        names: of `tracking.to`.
        run: what they show; None only without names.
    """

    def __init__(self, names: Sequence[str] = (), run: TrackedRun | None = None) -> None:
        for name in names:
            if not _installed(_KINDS[name][2]):  # now, and not after hours of training
                _give_up(name, f"{_KINDS[name][3]} is not installed (pip install {_KINDS[name][3]})")
        self._names, self._run = [name for name in names if name not in _failed], run
        self._feeds: list[_Feed] | None = None

    @property
    def active(self) -> bool:
        """Whether there is a tracker."""
        return bool(self._names)

    def scalars(self, values: Mapping[str, float], step: int, at: float | None = None) -> None:
        """Values of a step, taken at a time (seconds since 1970; now when None). Returns at once."""
        moment = time.time() if at is None else at
        self._send(lambda tracker: tracker.scalars(_named(values), step, moment))

    def summary(self, values: Mapping[str, float]) -> None:
        """Values of the whole run. Returns at once."""
        self._send(lambda tracker: tracker.summary(_named(values)))

    def close(self, status: Status) -> None:
        """The run has ended; waits for the trackers, but not for ever."""
        feeds, self._feeds = self._feeds or [], None
        for feed in feeds:
            feed.send(lambda tracker: tracker.close(status))
            feed.send(None)
        until = time.monotonic() + _PATIENCE_S
        for feed in feeds:
            feed.join(until)

    def _send(self, call: Callable[[Tracker], None]) -> None:
        if self._feeds is None:
            assert self._run is not None or not self._names
            self._feeds = [_Feed(name, self._run) for name in self._names if self._run]
        for feed in self._feeds:
            feed.send(call)


@contextmanager
def tracked(section: TrackingConfig, run: TrackedRun) -> Iterator[Tracking]:
    """The trackers of section `tracking` for the length of the block."""
    tracking = Tracking(section.to, run)
    try:
        yield tracking
    except BaseException:
        tracking.close("failed")
        raise
    tracking.close("finished")


class _Feed:
    """Hands one tracker its calls, in their order."""

    def __init__(self, name: str, run: TrackedRun) -> None:
        self._name, self._run = name, run
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def send(self, call: Callable[[Tracker], None] | None) -> None:
        """`None` ends it."""
        if self._thread.is_alive():
            self._calls.put(call)

    def join(self, until: float) -> None:
        """Wait for the end of all calls."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            _give_up(self._name, f"no answer for {_PATIENCE_S:.0f} s")

    def _work(self) -> None:
        try:
            tracker = self._begun()
            while (call := self._calls.get()) is not None:
                call(tracker)
        # Whatever a library throws must not end the run; wandb.Error and others have no common base.
        except Exception as error:
            _give_up(self._name, f"{type(error).__name__}: {first_line(error)}")

    def _begun(self) -> Tracker:
        """The tracker; it goes on with what an earlier command began with the same configuration."""
        module, kind, _, _ = _KINDS[self._name]
        note = join(self._run.folder, f"{self._name}.json")
        now = {"config": self._run.config, "project": self._run.project}
        before = read_json(note) if exists(note) else {}
        same = {key: before.get(key) for key in now} == now
        make: Any = getattr(import_module(f"ckd_ray.tracking.{module}"), kind)
        tracker: Tracker = make(self._run, before["identity"] if same else None)
        write_json_atomic(note, {**now, "identity": tracker.identity})
        return tracker


def _named(values: Mapping[str, float]) -> dict[str, float]:
    """The values under names that every tracker takes: `MRR@10` becomes `MRR_10`."""
    return {re.sub(r"[^\w./ -]", "_", name): float(value) for name, value in values.items()}
