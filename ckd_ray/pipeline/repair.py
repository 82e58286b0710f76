"""After a stage has failed: broken files of the stores that it may have read are removed, to be made again."""

from __future__ import annotations

from typing import Any

import ray

from ckd_ray.files import delete, exists, join, list_folders
from ckd_ray.progress import say
from ckd_ray.ray_util.waiting import answer
from ckd_ray.runs.directory import RunDir
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.writing import MANIFEST

_SHARDS_A_TASK = 16


def remove_broken_files(run: RunDir) -> int:
    """Read every file of every finished store of the run, in Ray tasks; delete and name those whose checksum fails.

    Returns:
        how many files were removed, or are missing.
    """
    check = ray.remote(num_cpus=0.5)(_broken)
    pending: dict[Any, str] = {}
    for folder in (run.embeddings, run.student_embeddings, run.encoder_embeddings):
        for name in list_folders(folder):
            uri = join(folder, name)
            if exists(join(uri, MANIFEST)):
                shards = EmbeddingStore.open(uri).num_shards
                pending[check.remote(uri, None)] = uri
                for first in range(0, shards, _SHARDS_A_TASK):
                    pending[check.remote(uri, range(first, min(first + _SHARDS_A_TASK, shards)))] = uri
    removed = 0
    for reference, uri in pending.items():
        for name in answer(f"the check of {uri}", reference):
            say(f"{join(uri, name)}: missing, or its bytes do not match its checksum; it is made again")
            delete(join(uri, name))
            removed += 1
    return removed


def _broken(uri: str, shards: range | None) -> list[str]:
    store = EmbeddingStore.open(uri)
    return store.verify_other_files() if shards is None else store.verify(shards)
