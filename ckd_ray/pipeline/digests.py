"""SHA-256 of many files: a few here, more than a quarter of a gibibyte in Ray tasks."""

from __future__ import annotations

from collections.abc import Mapping

import ray

from ckd_ray.store.files import join, sha256_of

_BYTES_A_TASK = 1 << 28


def digests_of(folder: str, sizes: Mapping[str, int]) -> dict[str, str]:
    """The SHA-256 of each file of `folder`.

    Args:
        sizes: its path in the folder -> its bytes.
    """
    groups = list(_groups(sizes))
    if len(groups) < 2 or not ray.is_initialized():
        return {name: digest for group in groups for name, digest in _digests(folder, group).items()}
    task = ray.remote(num_cpus=0.5)(_digests)
    found: dict[str, str] = {}
    for digests in ray.get([task.remote(folder, group) for group in groups]):
        found |= digests
    return found


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names, in their order, so that a group has `_BYTES_A_TASK` bytes or one file."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = _BYTES_A_TASK
        groups[-1].append(name)
        room -= size
    return groups


def _digests(folder: str, names: list[str]) -> dict[str, str]:
    return {name: sha256_of(join(folder, name)) for name in names}
