"""What a finished command shows: the closing table for people, one object for programs."""

from __future__ import annotations

from typing import Any

from ckd_ray.config import Config
from ckd_ray.pipeline.artefact import manifest_of
from ckd_ray.pipeline.context import RunContext
from ckd_ray.pipeline.runner import StageReport
from ckd_ray.progress import duration, say
from ckd_ray.store.files import exists, join, read_json


def summary(config: Config, reports: list[StageReport]) -> dict[str, Any]:
    """The object that `--json` prints."""
    context = RunContext.of(config)
    return {
        "run": context.run,
        "student": context.path("student") if manifest_of(context.path("student")) else None,
        "stages": [
            {
                "name": r.name,
                "skipped": r.skipped,
                "seconds": round(r.seconds, 3),
                "figures": r.figures,
                "where": r.where,
            }
            for r in reports
        ],
        "comparison": _comparison(context) if any(r.name == "evaluate" for r in reports) else None,
    }


def _comparison(context: RunContext) -> Any:
    path = join(context.path("evaluation"), "comparison.json")
    return read_json(path) if exists(path) else None


def closing_table(config: Config, reports: list[StageReport]) -> None:
    """Seconds a stage, *teacher against student*, and where the student is; on standard error."""
    context = RunContext.of(config)
    width = max((len(r.name) for r in reports), default=0)
    say("")
    for r in reports:
        state = "  (done before)" if r.skipped else ""
        say(f"  {r.name:<{width}}  {duration(r.seconds):>12}{state}")
    total = sum(r.seconds for r in reports if not r.skipped)
    say(f"  {'this call':<{width}}  {duration(total):>12}")
    if any(r.name == "evaluate" for r in reports):
        from ckd_ray.evaluate.compare import render

        say("")
        say(render(_comparison(context)))
        say("")
        say(f"student: {context.path('student')}")
