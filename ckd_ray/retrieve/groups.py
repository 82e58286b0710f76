"""Passages in groups of about equal length, each filled up by repeating its last row, which changes no maximum.

Shapes: n passages of a group, T rows, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ckd_ray.arrays import Int64Array
from ckd_ray.model.length_buckets import ranges
from ckd_ray.retrieve.rows import RangeRows

# Rows that are gathered at a time: 8 MiB of float16 at 128 dimensions. More would be fresh pages each time.
_GATHERED = 1 << 15
_GPU_GATHERED = 1 << 20
# Lengths are rounded up to a multiple of this: 2 % more rows, at most 45 groups of passages up to 180 rows.
_ROUND = 4


@dataclass(frozen=True)
class Group:
    """`members` (n,) of the passages asked for, all with `length` rows: rows_TD (n * length, D) float16."""

    length: int
    members: Int64Array
    rows_TD: Tensor


def groups_of(source: RangeRows, passages: Int64Array, device: torch.device) -> Iterator[Group]:
    """The passages that have rows, in groups of equal rounded length, at most `_GATHERED` rows at a time."""
    most = _GPU_GATHERED if device.type == "cuda" else _GATHERED
    lengths = source.lengths[passages]
    rounded = -(-lengths // _ROUND) * _ROUND
    order = np.argsort(rounded, kind="stable")
    order = order[np.searchsorted(rounded[order], 1) :]
    ends = np.cumsum(rounded[order])
    start = 0
    while start < len(order):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        chosen = order[start:stop]
        length_n = lengths[chosen]
        within = ranges(np.zeros(len(chosen), np.int64), rounded[chosen])
        index = np.repeat(source.offsets[passages[chosen]], rounded[chosen])
        index += np.minimum(within, np.repeat(length_n - 1, rounded[chosen]))
        rows_TD = source.take(index).to(device)
        sizes, counts = np.unique(rounded[chosen], return_counts=True)
        at = row = 0
        for length, count in zip(sizes.tolist(), counts.tolist(), strict=True):
            yield Group(length, chosen[at : at + count], rows_TD[row : row + count * length])
            at, row = at + count, row + count * length
        start = stop
