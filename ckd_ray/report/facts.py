"""What the page shows, read from a run directory. A part that the run does not have yet is None or empty."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckd_ray.errors import UserError
from ckd_ray.evaluate.table import TABLE
from ckd_ray.files import exists, filesystem_of, join, last_part, list_files, read_json
from ckd_ray.inspection.inspect import find_query, inspect_at
from ckd_ray.inspection.labelled_run import LabelledRun
from ckd_ray.inspection.summary import summarize_labels
from ckd_ray.pipeline.graph import STAGES
from ckd_ray.report.wins import SplitWins, wins_of
from ckd_ray.runs.artifact import is_finished, manifest_of
from ckd_ray.runs.directory import RunDir
from ckd_ray.runs.finished import FinishedRun

_LABELS = 4  # training queries whose labels are shown
_PASSAGES = 8  # of the ranking of each
_WORDS = 45  # of a passage


@dataclass(frozen=True)
class Facts:
    """Everything on the page.

    Attributes:
        collection: its manifest.
        measures, comparison, closing: files of `evaluation/` (closing is the table of all systems); table: that of
            `compare/`; search: that of `tune/`; against: the files that `evaluate --against` writes.
        stages: name, folder, seconds and figures of the finished ones, in order.
        curves: `teacher`, `student` -> records of metrics.jsonl.
        labels: of `summarize_labels`, and `examples`, which are objects of `inspect_query`.
    """

    run: FinishedRun
    collection: dict[str, Any]
    measures: dict[str, Any] | None
    comparison: dict[str, Any]
    closing: dict[str, Any] | None
    table: dict[str, Any] | None
    search: dict[str, Any] | None
    against: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    curves: dict[str, list[dict[str, Any]]]
    wins: list[SplitWins]
    labels: dict[str, Any] | None

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run."""
        found: dict[str, Any] = self.run.record.get("config", {})
        return found


def gather(run: FinishedRun) -> Facts:
    """Read the run. Memory holds one number a query, and the texts of a few."""
    paths = run.paths
    evaluation, collection = paths.evaluation, manifest_of(paths.corpus)
    measures = _maybe(join(evaluation, "measures.json"))
    return Facts(
        run=run,
        collection=collection or {},
        measures=measures,
        comparison=_maybe(join(evaluation, "comparison.json")) or {},
        closing=_maybe(join(evaluation, TABLE)),
        table=_maybe(join(paths.compare, "table.json")),
        search=_maybe(join(paths.tune, "summary.json")),
        against=[read_json(join(evaluation, n)) for n in list_files(evaluation, ".json") if n.startswith("against-")],
        stages=_stages(run),
        curves={
            name: _records(join(folder, "metrics.jsonl"))
            for name, folder in (("teacher", paths.teacher), ("student", paths.student))
        },
        wins=wins_of(run, measures) if collection and measures else [],
        labels=_labels(run) if collection else None,
    )


def _maybe(uri: str) -> Any:
    return read_json(uri) if exists(uri) else None


def _stages(run: FinishedRun) -> list[dict[str, Any]]:
    found = []
    for stage in STAGES:
        of_run = stage.output(RunDir(run.paths.root))
        # A variant has no stages before its student, and an old one may have no labels of its own.
        manifest = manifest_of(stage.output(run.paths)) or manifest_of(of_run)
        if manifest is not None and "made_of" in manifest:
            seconds, figures = manifest.get("seconds", 0.0), manifest.get("figures", {})
            found.append({"name": stage.name, "folder": last_part(of_run), "seconds": seconds, "figures": figures})
    return found


def _records(uri: str) -> list[dict[str, Any]]:
    if not exists(uri):
        return []
    fs, path = filesystem_of(uri)
    with fs.open_input_stream(path) as stream:
        lines = stream.read().decode("utf-8").splitlines()
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise UserError("not lines of JSON", where=uri, found=str(error)) from error


def _labels(run: FinishedRun) -> dict[str, Any] | None:
    """The summary over a sample of training queries, and some of them in full: those to which collective labels add
    relevant passages come first."""
    if not all(is_finished(folder) for folder in (run.paths.labels, run.paths.embeddings)):
        return None
    opened = LabelledRun.of(run)
    summary = summarize_labels(opened)
    first = summary["raising"]
    chosen = [*_spaced(first), *_spaced([q for q in summary["queries"] if q not in first])][:_LABELS]
    examples = [inspect_at(opened, find_query(opened, query), _PASSAGES, _WORDS) for query in chosen]
    return {**summary, "examples": examples}


def _spaced(ids: list[str]) -> list[str]:
    """At most `_LABELS` of them, evenly spaced."""
    return [ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, min(_LABELS, len(ids))).astype(int))]
