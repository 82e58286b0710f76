"""From observed stages to the cost of each unit of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Observation:
    """What was done, in units (`work.stage_work`), and what it took: seconds or bytes."""

    work: Mapping[str, float]
    cost: float


def fit(observations: Sequence[Observation], known: Mapping[str, float] | None = None) -> dict[str, float]:
    """The cost of each unit: least squares of the relative errors, with no cost below zero.

    A stage at two sizes gives two equations for its fixed part and its part a unit. Stages that do the same work
    (`embed` and `evaluate` both encode) share its unit, so all are solved together.

    Args:
        known: costs that are given, not fitted.
    """
    known = known or {}
    units = sorted({unit for o in observations for unit in o.work} - set(known))
    rows = np.array([[o.work.get(unit, 0.0) for unit in units] for o in observations], np.float64)
    rest = [
        o.cost - sum(known[unit] * amount for unit, amount in o.work.items() if unit in known) for o in observations
    ]
    weights = 1 / np.maximum([o.cost for o in observations], 1e-3)
    found = _not_negative(rows * weights[:, None], np.maximum(rest, 0.0) * weights)
    return dict(zip(units, found.tolist(), strict=True)) | dict(known)


def _not_negative(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """x >= 0 with the least |rows x - wanted|, by leaving out the most negative unit until there is none.

    Columns are scaled to one length: units differ by ten orders of magnitude.
    """
    scale = np.linalg.norm(rows, axis=0)
    free = scale > 0
    found = np.zeros(rows.shape[1])
    while free.any():
        solution = np.linalg.lstsq(rows[:, free] / scale[free], wanted, rcond=None)[0]
        if solution.min() >= 0:
            found[free] = solution / scale[free]
            break
        free[np.flatnonzero(free)[solution.argmin()]] = False
    return found
