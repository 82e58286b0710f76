"""After a stage has failed: is a store that it reads damaged? Then what is broken is removed, to be computed again."""

from __future__ import annotations

from typing import Any

import ray

from ckd_ray.files import delete, exists, join, list_folders
from ckd_ray.progress import say
from ckd_ray.runs.directory import RunContext
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.writing import MANIFEST

# The folders of a run that hold stores.
_HOLDERS = ("embeddings", "student_embeddings", "baselines/encoder_embeddings")
_SHARDS_A_TASK = 16


def remove_broken_files(context: RunContext) -> int:
    """Read every file of every finished store of the run, in Ray tasks; delete and name those whose checksum fails.

    Returns:
        how many files were removed, or are missing.
    """
    check = ray.remote(num_cpus=0.5)(_broken)
    pending: dict[Any, str] = {}
    for holder in _HOLDERS:
        for name in list_folders(context.path(holder)):
            uri = context.path(holder, name)
            if exists(join(uri, MANIFEST)):
                shards = EmbeddingStore.open(uri).num_shards
                pending[check.remote(uri, None)] = uri
                for first in range(0, shards, _SHARDS_A_TASK):
                    pending[check.remote(uri, range(first, min(first + _SHARDS_A_TASK, shards)))] = uri
    removed = 0
    for reference, uri in pending.items():
        for name in ray.get(reference):
            say(f"{join(uri, name)}: missing, or its bytes do not match its checksum; it is made again")
            delete(join(uri, name))
            removed += 1
    return removed


def _broken(uri: str, shards: range | None) -> list[str]:
    store = EmbeddingStore.open(uri)
    return store.verify_other_files() if shards is None else store.verify(shards)
