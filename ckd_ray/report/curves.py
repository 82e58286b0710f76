"""The curves of a training, and what its targets were like."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ckd_ray.distill.objectives import BASELINE, OBJECTIVES
from ckd_ray.distill.targets import degenerate, targets_of
from ckd_ray.report.plots import Series, lines

Records = list[dict[str, Any]]
_TARGETS = {"target_entropy_share": "entropy, share of the highest", "label_mass": "probability of the label"}


def _series(records: Records, key: str, name: str) -> Series:
    return Series(name, [(float(r["step"]), float(r[key])) for r in records if key in r])


def loss_curve(system: str, records: Records) -> Markup:
    """Its loss at every record, and the running mean of a twentieth of them."""
    loss = _series(records, "loss", "loss")
    values = [value for _, value in loss.points]
    window = max(1, len(values) // 20)
    recent = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    smooth = [(step, sum(some) / len(some)) for (step, _), some in zip(loss.points, recent, strict=True)]
    shown = [loss, Series(f"mean of {window} records", smooth)] if window > 1 else [loss]
    return lines(shown, x="step", y=f"Loss of the {system}")


def dev_curves(system: str, records: Records) -> Markup:
    """The measures that training took on dev (`mrr@10`)."""
    keys = dict.fromkeys(k for r in records for k, v in r.items() if "@" in k and isinstance(v, int | float))
    return lines([_series(records, key, key) for key in keys], x="step", y=f"Dev, {system}", from_zero=False)


def target_curves(records: Records) -> Markup:
    """The entropy of the student's targets and the label's probability in them, step by step."""
    return lines([_series(records, key, name) for key, name in _TARGETS.items()], x="step", y="Targets of the student")


def target_figures(records: Records, config: dict[str, Any]) -> dict[str, Any] | None:
    """Means over the training of `targets_of`, and under `warning` a sentence on targets that teach nothing new."""
    figures = targets_of(records)
    if not figures:
        return None
    distill = config.get("distill", {})
    reads_teacher = OBJECTIVES.get(distill.get("objective", ""), BASELINE).has_teacher
    warning = degenerate(figures, distill.get("temperature", "auto")) if reads_teacher else None
    return {**figures, "warning": warning}
