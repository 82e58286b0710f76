"""What the teacher costs: a step of `collective` against one of `contrastive` on the same batch."""

from __future__ import annotations

import argparse
from typing import Any

from common import figure
from distill_run import DistillRun, median, seconds_a_step


def teacher_price(run: DistillRun, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """In turn some steps of both; the median over the steps of collective's seconds over contrastive's."""
    batch, block, rounds = (8, 4, 4) if args.quick else (32, 5, 6)
    seconds: dict[str, list[float]] = {"contrastive": [], "collective": []}
    model = run.model()
    for i in range(rounds):
        for name in sorted(seconds, reverse=bool(i % 2)):
            seconds[name] += seconds_a_step(run, run.task(name, batch), 1 + i * block, block, model)
    pairs = zip(seconds["collective"], seconds["contrastive"], strict=True)
    settings["step"] = {
        "batch": batch,
        "steps": rounds * block,
        **{f"{name}_seconds": round(median(values), 4) for name, values in seconds.items()},
    }
    return {"collective_over_contrastive_step": figure(median([a / b for a, b in pairs]), 1.05, "lower")}
