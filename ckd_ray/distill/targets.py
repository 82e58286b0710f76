"""Figures of a training's targets, and whether such targets can teach anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FIGURES = ("target_entropy", "target_entropy_share", "label_mass")
# Below the first share of the highest entropy a target is one-hot, above the second it is uniform.
_ONE_HOT, _UNIFORM = 0.02, 0.98


def targets_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the recorded steps of `target_entropy` (nats), of its share of the highest possible entropy, and of
    `label_mass`, the probability of the label. Empty when no record has them."""
    known = [record for record in records if all(name in record for name in FIGURES)]
    if not known:
        return {}
    return {name: round(float(np.mean([record[name] for record in known])), 6) for name in FIGURES}


def degenerate(targets: Mapping[str, float], temperature: float | str) -> str | None:
    """A warning when the teacher's targets were one-hot or uniform, and so taught no more than the label or label
    smoothing; None when they were neither, or are unknown.

    Args:
        targets: the result of `targets_of`.
        temperature: `distill.temperature`.
    """
    share = targets.get("target_entropy_share")
    if share is None or _ONE_HOT <= share <= _UNIFORM:
        return None
    kind, change = "uniform: the teacher prefers no passage", "lower"
    if share < _ONE_HOT:
        kind, change = "one-hot: the teacher teaches nothing beyond the label", "raise"
    advice = f"{change} distill.temperature ({temperature} now), or set it to auto"
    if temperature == "auto":
        advice = "look at rankings and labels with ckd-ray inspect"
    entropy = targets["target_entropy"]
    return f"the targets are {kind} (entropy {entropy:.3f} nats, {share:.1%} of the highest possible); {advice}"
