"""What a tracker is told, and what it does with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Status = Literal["finished", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker shows it.

    Attributes:
        name: what people read.
        group: the run that it belongs to: the same as the name, or that of which it is a student or a trial.
        project: the project of Weights & Biases, and the experiment of MLflow.
        config: the resolved configuration, without keys of storage.
        folder: where the trackers keep what they need to go on, and TensorBoard its events.
    """

    name: str
    group: str
    project: str
    config: dict[str, Any]
    folder: str


class Tracker(Protocol):
    """A tracked run that has begun. Every method may fail in whatever way the library has.

    A tracker is constructed with the `TrackedRun` and the `identity` under which an earlier command began it, or None.

    Attributes:
        identity: under which a later command goes on with it.
    """

    identity: str

    def scalars(self, values: Mapping[str, float], step: int, time: float) -> None:
        """Values of a step, such as `distill/loss`; `time` in seconds since 1970."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Values of the whole run, such as `evaluate/test/student/nDCG_10`."""

    def close(self, status: Status) -> None:
        """Everything is written when it returns."""


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The configuration as `section.key` -> value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found
