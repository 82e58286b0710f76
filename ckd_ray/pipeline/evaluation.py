"""The evaluate stage: embed with the student, search with teacher and student, measure, compare with the baselines.

Rankings are read, written as a run and measured one part (some hundred queries) at a time; what stays in memory is one
number a query and measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from ckd_ray.config import Config
from ckd_ray.data import Collection
from ckd_ray.evaluate.measures import Measures, measure_parts
from ckd_ray.evaluate.paired import compare
from ckd_ray.evaluate.runs import falling_scores, without_own_passage, write_trec_run
from ckd_ray.evaluate.table import TABLE, build_table
from ckd_ray.files import exists, join, write_json_atomic
from ckd_ray.pipeline.stages import skips_own_passage
from ckd_ray.progress import say, without_keys
from ckd_ray.ray_util.parts import part_file, query_spans
from ckd_ray.retrieve.rankings import read_ranking_part
from ckd_ray.retrieve.servers import SearchSettings, serving
from ckd_ray.retrieve.stream import RetrieveJob, retrieve
from ckd_ray.runs.artifact import MANIFEST, identity_of, make, reopen
from ckd_ray.runs.directory import RunContext
from ckd_ray.runs.fingerprint import fingerprint
from ckd_ray.store import EmbeddingStore

Found = dict[str, dict[str, Measures]]  # split -> system -> measures


def evaluate_run(context: RunContext, made_of: str) -> dict[str, Any]:
    """Measure teacher and student (in a variant: the student alone) on every evaluation split of the collection.

    Writes `evaluation/SYSTEM.SPLIT.run` (TREC), `measures.json`, `SYSTEM.SPLIT.per_query.json`, `comparison.json`
    (teacher against student) and, but for a variant, `table.json` (these and the run's baselines).
    """
    from ckd_ray.pipeline.baselines import measure_baselines

    collection = Collection.open(context.run)
    splits = evaluation_splits(context.config, collection)
    if not splits:
        say("evaluate: the collection has none of the splits of evaluate.splits")
    embed_student(context, splits)
    found: Found = {split: {} for split in splits}
    for system in ("student",) if context.variant else ("teacher", "student"):
        embeddings = context.path("embeddings" if system == "teacher" else "student_embeddings")
        out = context.path("evaluation")
        for split, measures in measure_system(context, system, embeddings, splits, out).items():
            found[split][system] = measures
    write_measures(context.path("evaluation"), found, context.config, collection)
    if context.variant is None:
        baselines = measure_baselines(context, splits, context.config.evaluate.baselines)
        table = build_table({split: {**baselines.measures(split), **systems} for split, systems in found.items()})
        write_json_atomic(context.path("evaluation", TABLE), without_keys({**table, "left_out": baselines.left_out}))
    count = sum(collection.num_queries(split) for split in splits)
    figures = {"count": count, "unit": "queries", "splits": splits, "engine": context.config.evaluate.engine}
    return {**figures, "student": identity_of(context.path("student"))}


def evaluation_splits(config: Config, collection: Collection) -> list[str]:
    """The splits of `evaluate.splits` that the collection has."""
    return [split for split in config.evaluate.splits if split in collection.splits]


def embed_student(context: RunContext, splits: list[str]) -> None:
    """`student_embeddings/`, unless they are there. They have a fingerprint of their own: other measures or depths do
    not embed the corpus again."""
    from ckd_ray.pipeline.work import embed_all

    student_of = fingerprint(
        student=identity_of(context.path("student")), embed=identity_of(context.path("embeddings"))
    )
    checkpoint, out = context.path("student"), context.path("student_embeddings")
    if not all(exists(join(out, f"queries.{split}", MANIFEST)) for split in splits):
        reopen(out)  # they were made for other splits

    def work() -> dict[str, Any]:
        store = embed_all(context, checkpoint, out, student_of, stage="evaluate", splits=splits)
        return {"passages": store.num_passages, "figures": {"student": identity_of(checkpoint)}}

    make(out, student_of, work)


def measure_system(
    context: RunContext, system: str, embeddings: str, splits: list[str], out: str, *, engine: str | None = None
) -> dict[str, Measures]:
    """Search with the stores below `embeddings`, write `SYSTEM.SPLIT.run` into `out`, and measure, split by split.

    Args:
        engine: `exact`, or `retrieve` for that of section retrieve; `evaluate.engine` when None.
    """
    from ckd_ray.pipeline.work import search_settings

    config, collection = context.config, Collection.open(context.run)
    settings = config.evaluate
    store = EmbeddingStore.open(join(embeddings, "passages"))
    skips = skips_own_passage(config)
    depth = min(settings.depth, max(1, store.num_passages))
    rankings = join(out, "rankings", system)
    counts = {split: collection.num_queries(split) for split in splits}
    search = SearchSettings("exact")
    if (engine or settings.engine) == "retrieve":
        search = search_settings(config, store, sum(counts.values()))
    with serving(store, search, config.retrieve.actors) as servers:
        for split in splits:
            queries = join(embeddings, f"queries.{split}")
            job = RetrieveJob(context.run, split, queries, rankings, depth + skips)
            retrieve(job, servers, counts[split], stage=f"evaluate {system} {split}")
    return measure_rankings(context, system, splits, out, depth)


def measure_rankings(context: RunContext, system: str, splits: list[str], out: str, depth: int) -> dict[str, Measures]:
    """Write `SYSTEM.SPLIT.run` of the rankings in `out`/rankings/SYSTEM, and measure them, split by split.

    Args:
        depth: passages a query that count, when the query's own passage is left out; else all that are there.
    """
    settings, collection = context.config.evaluate, Collection.open(context.run)
    measured = {}
    for split in splits:
        own = depth if skips_own_passage(context.config) else None
        parts = RankedParts(join(out, "rankings", system), split, collection.num_queries(split), own)
        write_trec_run(join(out, f"{system}.{split}.run"), parts, f"ckd-ray-{system}")
        labels = labelled_parts(parts, collection)
        measured[split] = measure_parts(labels, settings.measures, settings.relevance_threshold)
    return measured


class RankedParts:
    """The parts of a split's rankings as runs (query_id, doc_id, rank, score), read one at a time.

    Args:
        depth: when given, the query's own passage is left out and the rest cut to so many.
    """

    def __init__(self, folder: str, split: str, num_queries: int, depth: int | None = None) -> None:
        self.folder, self.split, self.depth = folder, split, depth
        self.spans = query_spans(num_queries)

    def __iter__(self) -> Iterator[pd.DataFrame]:
        return (self.read(part) for part in range(len(self.spans)))

    def read(self, part: int) -> pd.DataFrame:
        """Part number `part`."""
        uri = join(self.folder, part_file(self.split, part))
        table = read_ranking_part(uri, ["query_id", "passage_id", "rank", "score"])
        run = table.to_pandas().rename(columns={"passage_id": "doc_id"})
        return falling_scores(run if self.depth is None else without_own_passage(run, self.depth))


def labelled_parts(parts: RankedParts, collection: Collection) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """(run, qrels) of each part."""
    labels = collection.qrels(parts.split)
    order = np.argsort(labels.query_index, kind="stable")
    sorted_queries = labels.query_index[order]
    for part, (first, stop) in enumerate(parts.spans):
        low, high = np.searchsorted(sorted_queries, [first, stop])
        rows = order[low:high]
        qrels = pd.DataFrame(
            {
                "query_id": [labels.query_ids[i] for i in rows],
                "doc_id": [labels.passage_ids[i] for i in rows],
                "relevance": labels.relevance[rows],
            }
        )
        yield parts.read(part), qrels


def write_measures(folder: str, found: Found, config: Config, collection: Collection) -> None:
    """`measures.json` holds the student's means of the last split at the top, and all of them by split and system."""
    by_split = {split: {name: m.mean for name, m in systems.items()} for split, systems in found.items()}
    top: dict[str, Any] = {}
    if found:
        last = list(found)[-1]
        system = "student" if "student" in found[last] else next(iter(found[last]))
        top = {**found[last][system].mean, "split": last, "system": system}
    settings = {
        "depth": config.evaluate.depth,
        "engine": config.evaluate.engine,
        "relevance_threshold": config.evaluate.relevance_threshold,
        "skip_same_id": skips_own_passage(config),
        "collection": collection.manifest.get("fingerprint"),
    }
    write_json_atomic(join(folder, "measures.json"), {**top, "splits": by_split, "settings": settings})
    for split, systems in found.items():
        for name, measures in systems.items():
            write_json_atomic(join(folder, f"{name}.{split}.per_query.json"), measures.per_query)
    comparison = {
        split: compare(systems["teacher"], systems["student"])
        for split, systems in found.items()
        if {"teacher", "student"} <= set(systems)
    }
    write_json_atomic(join(folder, "comparison.json"), comparison)
