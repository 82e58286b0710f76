"""The results of a finished command: a closing table for people, one object for programs."""

from __future__ import annotations

import os
import shlex
from typing import Any

from ckd_ray.config import Config
from ckd_ray.evaluate.table import TABLE, render_table
from ckd_ray.files import exists, join, read_json
from ckd_ray.pipeline.runner import StageReport
from ckd_ray.progress import duration, say
from ckd_ray.runs.artifact import manifest_of
from ckd_ray.runs.directory import RunContext, RunDir


def summary(config: Config, reports: list[StageReport]) -> dict[str, Any]:
    """The object that `--json` prints."""
    run = RunContext.of(config).paths
    evaluated = any(r.name == "evaluate" for r in reports)
    table = _written(run, TABLE) if evaluated else None
    return {
        "run": run.root,
        "student": run.student if manifest_of(run.student) else None,
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
        "comparison": _written(run, "comparison.json") if evaluated else None,
        "table": table,
        "verdict": table.get("verdict") if table else None,
    }


def _written(run: RunDir, name: str) -> Any:
    path = join(run.evaluation, name)
    return read_json(path) if exists(path) else None


def closing_table(config: Config, reports: list[StageReport]) -> None:
    """Print the results on standard error: a warning if the student is not better than the encoder, seconds a stage,
    the table of all systems, where the student is, and what to do next."""
    run = RunContext.of(config).paths
    width = max((len(r.name) for r in reports), default=0)
    table = _written(run, TABLE) if any(r.name == "evaluate" for r in reports) else None
    say("")
    if table and table["verdict"] and not table["verdict"]["better"]:
        say(table["verdict"]["text"])
        say("")
    for r in reports:
        state = "  (done before)" if r.skipped else ""
        say(f"  {r.name:<{width}}  {duration(r.seconds):>12}{state}")
    total = sum(r.seconds for r in reports if not r.skipped)
    say(f"  {'this call':<{width}}  {duration(total):>12}")
    if table:
        say("")
        say(render_table(table))
        say("")
        say(f"student: {run.student}")
        say("")
        say("next:")
        for line in next_commands(config, run.root):
            say(f"  {line}")


def next_commands(config: Config, root: str) -> list[str]:
    """What to do with a finished run, with its folder as a person would type it."""
    run = shlex.quote(root if "://" in root else min(root, os.path.relpath(root), key=len))
    own = ("init DIR", "a configuration for your own files in DIR")
    share = (f"export {run} --format pylate", "the student for another library, --what labels for its training")
    commands = [
        (f"search {run}", "asks for queries, and shows what the student finds"),
        (f"report {run}", "a page with the measures, the labels, and the queries won and lost"),
        own if config.collection.format == "docstrings" else share,
    ]
    width = max(len(command) for command, _ in commands)
    return [f"ckd-ray {command:<{width}}  {what}" for command, what in commands]
