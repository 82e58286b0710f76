"""The search engine that a run uses, and where it keeps its index."""

from __future__ import annotations

from ckd_ray.config import Config
from ckd_ray.files import delete, filesystem_of, is_local, join, list_files, make_folder
from ckd_ray.retrieve.faiss_index import DIGEST
from ckd_ray.retrieve.servers import SearchSettings
from ckd_ray.retrieve.shard_range import choose_engine
from ckd_ray.runs.directory import RunContext
from ckd_ray.runs.fingerprint import fingerprint
from ckd_ray.store import EmbeddingStore


def search_settings(config: Config, store: EmbeddingStore, num_queries: int) -> SearchSettings:
    """The engine for so many queries over this store; `auto` decides by the work that exact search would be."""
    engine: str = config.retrieve.engine
    if engine == "auto":
        codec = store.manifest["codec"]
        engine = choose_engine(num_queries, config.model.query_maxlen, store.num_tokens, store.dim, codec)
    return settings_of_engine(engine, config, store)


def settings_of_engine(engine: str, config: Config, store: EmbeddingStore) -> SearchSettings:
    """Section `retrieve` for one engine."""
    r = config.retrieve
    index = _kept_index(config, store) if engine == "faiss" else None
    return SearchSettings(engine, r.cells, r.nprobe, r.candidates, config.run.seed, index)


def _kept_index(config: Config, store: EmbeddingStore) -> str | None:
    """Where a faiss index over this store is kept, so that label and a resumed run need not build it again.

    Local runs only: faiss maps a file. An index of other settings or embeddings that lies there is removed.
    """
    folder = RunContext.of(config).paths.index
    if not is_local(folder):
        return None
    settings = {"cells": config.retrieve.cells, "seed": config.run.seed}
    made_of = fingerprint(shards=[s["sha256"] for s in store.manifest["shards"]], **settings)
    name = f"{made_of[:16]}.faiss"
    make_folder(folder)
    for other in list_files(folder, ""):
        if other not in (name, name + DIGEST):
            delete(join(folder, other))
    return filesystem_of(join(folder, name))[1]  # a path: faiss knows no file://
