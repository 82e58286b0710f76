"""What the targets of a training looked like, and whether they had anything to teach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckd_ray.config.schema import DistillConfig, TrainingConfig

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


def degenerate(targets: Mapping[str, float], settings: TrainingConfig) -> str | None:
    """A sentence for people when the teacher's targets were one-hot or uniform, which teaches nothing that the label or
    label smoothing does not; None when they were neither, or are unknown."""
    share = targets.get("target_entropy_share")
    if share is None or not isinstance(settings, DistillConfig):
        return None
    entropy = targets["target_entropy"]
    if share < _ONE_HOT:
        kind, more = "one-hot: the teacher teaches nothing beyond the label", "raise distill.temperature"
    elif share > _UNIFORM:
        kind, more = "uniform: the teacher prefers no passage", "lower distill.temperature"
    else:
        return None
    advice = (
        f"{more} ({settings.temperature} now), or set it to auto"
        if settings.temperature != "auto"
        else ("look at the rankings and labels with ckd-ray inspect")
    )
    return f"the targets are {kind} (entropy {entropy:.3f} nats, {share:.1%} of the highest possible); {advice}"
