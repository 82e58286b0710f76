"""Labelling the queries of a split, by the way of voting that suits the run."""

from __future__ import annotations

from typing import Any

from ckd_ray.config import Config
from ckd_ray.data import Collection
from ckd_ray.files import join, write_json_atomic
from ckd_ray.labels.files import manifest_of_labels
from ckd_ray.labels.stage import CELLS, EstimatedVotes, LabelJob, ServerVotes, find_special_cells, label
from ckd_ray.pipeline.search_engine import settings_of_engine
from ckd_ray.progress import say
from ckd_ray.retrieve.servers import serving
from ckd_ray.retrieve.shard_range import choose_engine
from ckd_ray.runs.artifact import MANIFEST
from ckd_ray.runs.directory import RunContext
from ckd_ray.store import EmbeddingStore


def label_split(context: RunContext, split: str, rankings: str, out: str) -> dict[str, Any]:
    """Label the queries of `split` from their `rankings` into `out`. The number of training queries decides who votes,
    so that labels of dev are made like those of training. Returns the figures of the stage."""
    config, run = context.config, context.paths
    job = LabelJob(
        run=run.root,
        split=split,
        checkpoint=run.teacher,
        passages=run.passages,
        rankings=rankings,
        out=out,
        settings=config.label,
    )
    store, collection = EmbeddingStore.open(run.passages), Collection.open(run.root)
    count = collection.num_queries(split)
    way = vote_way(config, store, collection.num_queries("train"))
    say(f"label: votes by {way}")
    if way == "feedback":
        queries_per_part = label(job, None, count)
    elif way == "estimate":
        cells = find_special_cells(join(out, CELLS), job, config.run.seed)
        queries_per_part = label(job, EstimatedVotes(cells), count)
    else:
        vectors = count * config.label.clusters * len(config.label.depths)
        with serving(store, settings_of_engine(way, config, store), config.retrieve.actors, vectors) as servers:
            queries_per_part = label(job, ServerVotes(servers, config.label.voters), count)
    manifest = manifest_of_labels(queries_per_part, split, config.label.depths)
    write_json_atomic(join(out, MANIFEST), manifest)
    return {"count": count, "unit": "queries", "votes": way}


def vote_way(config: Config, store: EmbeddingStore, num_queries: int) -> str:
    """How the centroids of `num_queries` queries get their tokens: by votes of the `feedback`, or by votes of the
    collection: its `exact` nearest neighbours, those that `faiss` finds, or an `estimate` of them (special_cells.py).
    `auto` is exact while that is affordable."""
    if config.label.token_vote == "feedback":
        return "feedback"
    if config.label.neighbours != "auto":
        return config.label.neighbours
    vectors = config.label.clusters * len(config.label.depths)
    engine = choose_engine(num_queries, vectors, store.num_tokens, store.dim)
    return "exact" if engine == "exact" else "estimate"
