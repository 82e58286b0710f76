"""What the targets of a training looked like, and whether they had anything to teach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FIGURES = ("target_entropy", "target_entropy_share", "label_mass")
# A target with less than this share of the highest entropy is the bare label, or one bare candidate; with more it is
# even.
_ONE_HOT, _UNIFORM = 0.02, 0.98


def targets_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the recorded steps: `target_entropy` (nats), its share of the highest possible entropy, and
    `label_mass`, the probability of the label. Empty without records of them."""
    known = [record for record in records if all(name in record for name in FIGURES)]
    if not known:
        return {}
    return {name: round(float(np.mean([record[name] for record in known])), 6) for name in FIGURES}


def degenerate(targets: Mapping[str, float], temperature: float | str) -> str | None:
    """A sentence for people when a teacher's targets were one-hot or uniform, which teaches nothing that the label or
    label smoothing does not; None when they were neither, or are unknown.

    Args:
        targets: of `targets_of`; temperature: `distill.temperature`.
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
