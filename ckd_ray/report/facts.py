"""What the page is made of, read from a run directory. A part that the run has not come to is None or empty."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from typing import Any

from ckd_ray.data import Collection
from ckd_ray.errors import UserError
from ckd_ray.evaluate.table import TABLE
from ckd_ray.files import exists, filesystem_of, join, list_files, read_json
from ckd_ray.labels.labelled_run import labels_of
from ckd_ray.pipeline.stages import STAGES
from ckd_ray.report.wins import Example, examples, extremes
from ckd_ray.runs.finished import FinishedRun

_EXAMPLES = 15  # won and lost queries a split, each
_LABELS = 4


@dataclass(frozen=True)
class SplitWins:
    """Differences of one split under one measure: those of all queries, and the extreme ones with their texts."""

    split: str
    measure: str
    gains: list[float]
    won: list[Example]
    lost: list[Example]


@dataclass(frozen=True)
class Facts:
    """Everything on the page.

    Attributes:
        measures, comparison, closing: of `evaluation/` (closing is its table of all systems); table: of `compare/`;
            search: of `tune/`; against: what `evaluate --against` has written.
        stages: name, folder, seconds, figures, of the finished ones in order.
        curves: `teacher`, `student` -> records of metrics.jsonl.
        labels: objects of `inspect_query` for some queries.
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
    labels: list[dict[str, Any]]


def gather(run: FinishedRun) -> Facts:
    """Read the run. Only what is shown is held: a number a query, and the texts of a few."""
    stages = _stages(run)
    evaluation = run.path("evaluation")
    measures = _maybe(join(evaluation, "measures.json"))
    built = exists(join(run.base, "corpus", "manifest.json"))
    return Facts(
        run=run,
        collection=read_json(join(run.base, "corpus", "manifest.json")) if built else {},
        measures=measures,
        comparison=_maybe(join(evaluation, "comparison.json")) or {},
        closing=_maybe(join(evaluation, TABLE)),
        table=_maybe(join(run.base, "compare", "table.json")),
        search=_maybe(join(run.base, "tune", "summary.json")),
        against=[read_json(join(evaluation, n)) for n in list_files(evaluation, ".json") if n.startswith("against-")],
        stages=stages,
        curves={
            name: _records(join(folder, "metrics.jsonl"))
            for name, folder in (("teacher", join(run.base, "teacher")), ("student", run.path("student")))
        },
        wins=_wins(run, measures) if built and measures else [],
        labels=_labels(run) if built else [],
    )


def _maybe(uri: str) -> Any:
    return read_json(uri) if exists(uri) else None


def _stages(run: FinishedRun) -> list[dict[str, Any]]:
    found = []
    for stage in STAGES:
        own = join(labels_of(run) if stage.folder == "labels" else run.path(stage.folder), "manifest.json")
        manifest = _maybe(own if exists(own) else join(run.base, stage.folder, "manifest.json"))
        if manifest is not None and "made_of" in manifest:
            seconds, figures = manifest.get("seconds", 0.0), manifest.get("figures", {})
            found.append({"name": stage.name, "folder": stage.folder, "seconds": seconds, "figures": figures})
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


def _wins(run: FinishedRun, measures: dict[str, Any]) -> list[SplitWins]:
    collection = Collection.open(run.base)
    found = []
    for split in reversed(list(measures["splits"])):
        files = {"student": run.path("evaluation"), "teacher": run.path("evaluation")}
        if not exists(join(files["teacher"], f"teacher.{split}.per_query.json")):
            files["teacher"] = join(run.base, "compare", "teacher")  # a variant measures its student alone
        paths = {name: join(folder, f"{name}.{split}.per_query.json") for name, folder in files.items()}
        if split not in collection.splits or not all(exists(path) for path in paths.values()):
            continue
        per_query = {name: read_json(path) for name, path in paths.items()}
        measure = next((m for m in per_query["student"] if m in per_query["teacher"]), None)
        if measure is None:
            continue
        values = {name: one[measure] for name, one in per_query.items()}
        won, lost = extremes(values["teacher"], values["student"], _EXAMPLES)
        settings = measures.get("settings", {})
        shown = examples(
            collection,
            split,
            won + lost,
            values,
            {name: join(folder, "rankings", name) for name, folder in files.items()},
            skip_same_id=bool(settings.get("skip_same_id")),
            relevance_threshold=int(settings.get("relevance_threshold", 1)),
        )
        gains = [values["student"][q] - values["teacher"][q] for q in values["student"] if q in values["teacher"]]
        found.append(SplitWins(split, measure, gains, shown[: len(won)], shown[len(won) :]))
    return found


def _labels(run: FinishedRun) -> list[dict[str, Any]]:
    """Some training queries as `ckd-ray inspect` shows them, evenly spaced over the split."""
    needed = [join(folder, "manifest.json") for folder in (labels_of(run), join(run.base, "embeddings"))]
    if not all(map(exists, needed)) or importlib.util.find_spec("ckd_ray.labels.inspect") is None:
        return []
    from ckd_ray.labels.inspect import inspect_query

    collection = Collection.open(run.base)
    ids = collection.queries("train").ids
    labelled = set(collection.qrels("train").query_ids)
    step = max(1, len(ids) // _LABELS)
    chosen = [next((q for q in ids[i : i + step] if q in labelled), None) for i in range(0, len(ids), step)]
    return [inspect_query(run.folder, query, 8) for query in [q for q in chosen if q is not None][:_LABELS]]
