"""SHA-256 of many files: up to a quarter of a gibibyte in this process, more in Ray tasks."""

from __future__ import annotations

from collections.abc import Mapping

from ckd_ray.files import join, sha256_of
from ckd_ray.ray_util.waiting import answer

_BYTES_A_TASK = 1 << 28


def digests_of(folder: str, sizes: Mapping[str, int]) -> dict[str, str]:
    """The SHA-256 of each file of `folder`.

    Args:
        sizes: its path in the folder -> its bytes.
    """
    groups = _groups(sizes)
    parts = _in_tasks(folder, groups) if len(groups) > 1 else [_digests(folder, group) for group in groups]
    return {name: digest for part in parts for name, digest in part.items()}


def _in_tasks(folder: str, groups: list[list[str]]) -> list[dict[str, str]]:
    import ray  # slow to import, and not needed to look at an artifact

    if not ray.is_initialized():
        return [_digests(folder, group) for group in groups]
    task = ray.remote(num_cpus=0.5)(_digests)
    references = [task.remote(folder, group) for group in groups]
    return [answer(f"the checksums of {folder}", reference) for reference in references]


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in groups of `_BYTES_A_TASK` bytes, or of one file; the order is kept."""
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
