"""The retrieve stage: rank the corpus for every training query."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckd_ray.config import Config
from ckd_ray.pipeline.stage import Stage
from ckd_ray.progress import say
from ckd_ray.runs.directory import RunContext

if TYPE_CHECKING:
    from ckd_ray.retrieve.servers import ServerGroup
    from ckd_ray.retrieve.stream import RecallSample

# Keys that exact search does not read.
_APPROXIMATE = frozenset({"cells", "nprobe", "candidates", "recall"})


def fingerprint_settings(config: Config) -> dict[str, Any]:
    """The section; approximate search also depends on the seed."""
    r = config.retrieve
    return r.for_fingerprint(_APPROXIMATE) if r.engine == "exact" else {**r.for_fingerprint(), "seed": config.run.seed}


def run(context: RunContext, fingerprint: str) -> dict[str, Any]:
    """Write the rankings. For an approximate engine, a sample of queries decides the effort that the wanted recall
    needs, and the recall of the rankings is measured."""
    from ckd_ray.data import Collection
    from ckd_ray.pipeline.search_engine import search_settings
    from ckd_ray.retrieve.servers import ServerGroup, serving
    from ckd_ray.retrieve.stream import RecallSample, RetrieveJob, retrieve
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
    with serving(store, settings, config.retrieve.actors, count * config.model.query_maxlen) as servers:
        sample = None
        if settings.engine != "exact" and count and isinstance(servers, ServerGroup):
            operations = 2.0 * config.model.query_maxlen * store.num_tokens * store.dim
            sample = RecallSample(job, servers, count, operations=operations, seed=config.run.seed)
            servers = _with_recall(servers, sample, config.retrieve.recall)
            figures["effort"] = servers.effort
        retrieve(job, servers, count)
        if sample is not None:
            recall = sample.written()
            figures |= recall
            say(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in recall.items() if k.startswith("recall")))
    return figures


def _with_recall(servers: ServerGroup, sample: RecallSample, wanted: float | None) -> ServerGroup:
    """The servers with the effort that the wanted recall needs."""
    if wanted is None:
        return servers
    effort, recall = sample.effort_for(wanted)
    s = servers.settings
    say(
        f"retrieve: recall@{sample.depth} {recall:.3f} on {sample.size} queries with nprobe {s.nprobe * effort:,} and"
        f" candidates {s.candidates * effort:,}"
        + ("" if recall >= wanted else f"; {wanted:g} is wanted, but more effort does not help: raise retrieve.nprobe")
    )
    return replace(servers, effort=effort)


STAGE = Stage(
    name="retrieve",
    inputs=lambda config: ("embed",),
    output=lambda run: run.rankings,
    fingerprint_settings=fingerprint_settings,
    run=run,
)
