"""Measuring a system (teacher, student, baseline) on the evaluation splits.

Rankings are read, written as a run and measured one part (some hundred queries) at a time; one number a query and
measure stays in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ckd_ray.config import Config
from ckd_ray.data import Collection
from ckd_ray.evaluate.measures import Measures, measure_parts
from ckd_ray.evaluate.paired import compare_values
from ckd_ray.evaluate.runs import falling_scores, without_own_passage, write_trec_run
from ckd_ray.files import join, write_json_atomic
from ckd_ray.pipeline.search_engine import search_settings
from ckd_ray.pipeline.stages.evaluate import skips_own_passage
from ckd_ray.ray_util.parts import part_file, query_spans
from ckd_ray.retrieve.rankings import read_ranking_part
from ckd_ray.retrieve.servers import SearchSettings, serving
from ckd_ray.retrieve.stream import RetrieveJob, retrieve
from ckd_ray.runs.directory import RunContext, passage_store, query_store, system_rankings
from ckd_ray.store import EmbeddingStore

Found = dict[str, dict[str, Measures]]  # split -> system -> measures


def evaluation_splits(config: Config, collection: Collection) -> list[str]:
    """The splits of `evaluate.splits` that the collection has."""
    return [split for split in config.evaluate.splits if split in collection.splits]


def measure_system(
    context: RunContext, system: str, embeddings: str, splits: Sequence[str], out: str, *, engine: str | None = None
) -> dict[str, Measures]:
    """Search with the stores below `embeddings`, write `SYSTEM.SPLIT.run` into `out`, and measure, split by split.

    Args:
        engine: `exact`, or `retrieve` for that of section retrieve; `evaluate.engine` when None.
    """
    config, collection = context.config, Collection.open(context.paths.root)
    settings = config.evaluate
    store = EmbeddingStore.open(passage_store(embeddings))
    skips = skips_own_passage(config)
    depth = min(settings.depth, max(1, store.num_passages))
    rankings = system_rankings(out, system)
    counts = {split: collection.num_queries(split) for split in splits}
    search = SearchSettings("exact")
    if (engine or settings.engine) == "retrieve":
        search = search_settings(config, store, sum(counts.values()))
    rows = sum(counts.values()) * config.model.query_maxlen
    with serving(store, search, config.retrieve.actors, rows) as servers:
        for split in splits:
            queries = query_store(embeddings, split)
            job = RetrieveJob(context.paths.root, split, queries, rankings, depth + skips)
            retrieve(job, servers, counts[split], stage=f"evaluate {system} {split}")
    return measure_rankings(context, system, splits, out, depth)


def measure_rankings(
    context: RunContext, system: str, splits: Sequence[str], out: str, depth: int
) -> dict[str, Measures]:
    """Write `SYSTEM.SPLIT.run` of the rankings in `out`/rankings/SYSTEM, and measure them, split by split.

    Args:
        depth: how many passages a query count when the query's own passage is left out; else all that are there do.
    """
    settings, collection = context.config.evaluate, Collection.open(context.paths.root)
    measured = {}
    for split in splits:
        own = depth if skips_own_passage(context.config) else None
        parts = RankedParts(system_rankings(out, system), split, collection.num_queries(split), own)
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
        split: compare_values(systems["teacher"].per_query, systems["student"].per_query, ("teacher", "student"))
        for split, systems in found.items()
        if {"teacher", "student"} <= set(systems)
    }
    write_json_atomic(join(folder, "comparison.json"), comparison)
