"""What the teacher costs: a step of `collective` against one of `contrastive` on the same batch."""

from __future__ import annotations

import argparse
from typing import Any

from common import figure
from distill_run import DistillRun, median, timed_steps


def teacher_price(run: DistillRun, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The median over the steps of collective's seconds over contrastive's.

    Step by step in turn, and which comes first in turn as well: a machine that becomes slower meanwhile does so for
    both.
    """
    batch, count = (8, 16) if args.quick else (32, 30)
    seconds: dict[str, list[float]] = {"contrastive": [], "collective": []}
    model = run.model()
    steps = {name: timed_steps(run.task(name, batch), 1, model) for name in seconds}
    for i in range(count):
        for name in sorted(seconds, reverse=bool(i % 2)):
            seconds[name].append(next(steps[name]))
    for timed in steps.values():
        timed.close()  # type: ignore[attr-defined]
    pairs = zip(seconds["collective"], seconds["contrastive"], strict=True)
    settings["step"] = {
        "batch": batch,
        "steps": count,
        **{f"{name}_seconds": round(median(values), 4) for name, values in seconds.items()},
    }
    return {"collective_over_contrastive_step": figure(median([a / b for a, b in pairs]), 1.05, "lower")}
