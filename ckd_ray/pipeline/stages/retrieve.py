"""The retrieve stage: rank the corpus for every training query."""

from __future__ import annotations

from typing import Any

from ckd_ray.config import Config
from ckd_ray.pipeline.stage import Stage
from ckd_ray.progress import say
from ckd_ray.runs.directory import RunContext

# Keys that exact search does not read.
_APPROXIMATE = frozenset({"cells", "nprobe", "candidates"})


def fingerprint_settings(config: Config) -> dict[str, Any]:
    """The section; approximate search also depends on the seed."""
    r = config.retrieve
    return r.for_fingerprint(_APPROXIMATE) if r.engine == "exact" else {**r.for_fingerprint(), "seed": config.run.seed}


def run(context: RunContext, fingerprint: str) -> dict[str, Any]:
    """Write the rankings; of an approximate engine the recall against exact search is measured."""
    from ckd_ray.data import Collection
    from ckd_ray.pipeline.search_engine import search_settings
    from ckd_ray.retrieve.servers import serving
    from ckd_ray.retrieve.stream import RetrieveJob, measured_recall, retrieve
    from ckd_ray.store import EmbeddingStore

    config, paths = context.config, context.paths
    store = EmbeddingStore.open(paths.passages)
    count = Collection.open(paths.root).num_queries("train")
    settings = search_settings(config, store, count)
    say(f"retrieve: engine {settings.engine}")
    depth = config.retrieve.depth
    figures: dict[str, Any] = {"count": count, "unit": "queries", "engine": settings.engine, "depth": depth}
    job = RetrieveJob(
        run=paths.root,
        split="train",
        queries=paths.query_embeddings("train"),
        out=paths.rankings,
        depth=min(depth, max(1, store.num_passages)),
    )
    with serving(store, settings, config.retrieve.actors) as servers:
        retrieve(job, servers, count)
        if settings.engine != "exact":
            operations = 2.0 * config.model.query_maxlen * store.num_tokens * store.dim
            recall = measured_recall(job, servers, count, operations=operations, seed=config.run.seed)
            figures |= recall
            say(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in recall.items() if k.startswith("recall")))
    return figures


STAGE = Stage(
    name="retrieve",
    inputs=lambda config: ("embed",),
    output=lambda run: run.rankings,
    fingerprint_settings=fingerprint_settings,
    run=run,
)
