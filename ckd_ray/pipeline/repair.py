"""After a stage has failed: is a store that it reads damaged? Then what is broken is removed, to be computed again."""

from __future__ import annotations

from typing import Any

import ray

from ckd_ray.pipeline.context import RunContext
from ckd_ray.progress import say
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.embeddings import MANIFEST
from ckd_ray.store.files import delete, exists, join, list_folders

# The folders of a run that hold stores.
_HOLDERS = ("embeddings", "student_embeddings")
_SHARDS_A_TASK = 16


def remove_broken_shards(context: RunContext) -> int:
    """Read every shard of every finished store of the run, in Ray tasks; delete and name those whose checksum fails.

    Returns:
        how many files were removed.
    """
    pending: dict[Any, str] = {}
    check = ray.remote(num_cpus=0.5)(_broken)
    for holder in _HOLDERS:
        for name in list_folders(context.path(holder)):
            uri = context.path(holder, name)
            if exists(join(uri, MANIFEST)):
                shards = EmbeddingStore.open(uri).num_shards
                for first in range(0, shards, _SHARDS_A_TASK):
                    pending[check.remote(uri, first, min(first + _SHARDS_A_TASK, shards))] = uri
    removed: set[str] = set()
    for reference, uri in pending.items():
        for name in ray.get(reference):
            if join(uri, name) not in removed:
                removed.add(join(uri, name))
                say(f"{join(uri, name)}: its bytes do not match its checksum; it is computed again")
                delete(join(uri, name))
    return len(removed)


def _broken(uri: str, first: int, stop: int) -> list[str]:
    return EmbeddingStore.open(uri).verify(range(first, stop))
