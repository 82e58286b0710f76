"""Ray tasks that read the shards of a store: which ones are intact, and what its manifest holds of them.

The driver sees headers, lengths and document frequencies, of a few tasks at a time, never embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from ckd_ray.files import list_files
from ckd_ray.ray_util.waiting import answer
from ckd_ray.store import ShardHeader, close_store, intact_shards, summarise_shards

_SHARDS_A_TASK = 64
# A task that checks shards reads all of their bytes, so it has fewer.
_CHECKED_A_TASK = 8
_TASKS_AT_ONCE = 256


def check_shards(uri: str, fingerprint: str, codec_digest: str) -> tuple[dict[int, ShardHeader], dict[str, str]]:
    """`intact_shards` of all shards in `uri`, checked byte by byte in Ray tasks."""
    names = list_files(uri, ".arrow")
    parts = [
        (uri, fingerprint, names[i : i + _CHECKED_A_TASK], codec_digest) for i in range(0, len(names), _CHECKED_A_TASK)
    ]
    good: dict[int, ShardHeader] = {}
    refused: dict[str, str] = {}
    for its_good, its_refused in _in_order(intact_shards, parts):
        good |= its_good
        refused |= its_refused
    return good, refused


def close_in_tasks(uri: str, fingerprint: str, spans: Sequence[tuple[int, int]], **extra: Any) -> None:
    """`close_store` of the shards that hold these texts; their headers and lengths are read in Ray tasks."""
    bounds = range(0, len(spans), _SHARDS_A_TASK)
    parts = [(uri, fingerprint, first, min(first + _SHARDS_A_TASK, len(spans))) for first in bounds]
    close_store(uri, fingerprint, _in_order(summarise_shards, parts), spans=spans, **extra)


def _in_order(work: Callable[..., Any], parts: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Results of `work(*part)` in the order of the parts; a single part needs no task."""
    if len(parts) <= 1:
        yield from (work(*part) for part in parts)
        return
    task = ray.remote(num_cpus=0.5)(work)
    waiting: list[Any] = []
    for part in parts:
        if len(waiting) == _TASKS_AT_ONCE:
            yield answer("the check of the shards", waiting.pop(0))
        waiting.append(task.remote(*part))
    while waiting:
        yield answer("the check of the shards", waiting.pop(0))
