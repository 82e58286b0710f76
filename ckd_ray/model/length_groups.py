"""Texts of like length are encoded together, so that little of the encoder's work goes into padding.

Shapes: n passages of a worker, L rows of the longest of a group.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

# What one more group costs, in padded tokens: kernels that start, and smaller matrix products.
OVERHEAD = 256
OVERHEAD_GPU = 4096
_MOST_GROUPS = 4
_WIDTHS = 32


def length_groups(lengths: npt.NDArray[np.integer], overhead: int = OVERHEAD) -> list[Int64Array]:
    """Indices of the texts in groups, shortest first, that together need the least padded tokens.

    At most four groups, each counted with `overhead` tokens; bounds are sought on a grid of 32 widths.
    """
    order = np.argsort(lengths, kind="stable").astype(np.int64)
    if not len(order):
        return []
    ascending = np.asarray(lengths, np.int64)[order]
    cell = -(-int(ascending[-1]) // _WIDTHS)
    # Groups may end where a grid line is crossed, and at the end.
    ends = np.append(np.flatnonzero(np.diff(ascending // cell)) + 1, len(order))
    width = ascending[ends - 1]
    starts = np.concatenate([[0], ends])
    # cost[i]: the least tokens of everything up to end i, with the groups used so far; back: where its last one began.
    cost = np.append(0, np.full(len(ends), np.inf))
    best, bounds = np.inf, [0, len(ends)]
    back: list[Int64Array] = []
    for _ in range(min(_MOST_GROUPS, len(ends))):
        whole = cost[:-1, None] + width[None] * (ends[None] - starts[:-1, None]) + overhead
        whole[np.arange(len(ends))[:, None] > np.arange(len(ends))[None]] = np.inf
        back.append(whole.argmin(0))
        cost = np.append(np.inf, whole.min(0))
        if cost[-1] < best:
            best, bounds = float(cost[-1]), [len(ends)]
            for row in reversed(back):
                bounds.insert(0, int(row[bounds[0] - 1]))
    return [order[starts[a] : starts[b]] for a, b in pairwise(bounds)]


def even_bounds(lengths: npt.NDArray[np.integer], parts: int) -> Int64Array:
    """Where to cut texts, in their order, into parts with about as many tokens each, so that none needs more memory
    than the others: `parts` - 1 positions, as `np.split` takes them. No part is empty.

    Raises:
        ValueError: there are fewer texts than parts.
    """
    count = len(lengths)
    if count < parts:
        raise ValueError(f"{parts} parts of {count} texts")
    total = np.cumsum(lengths, dtype=np.int64)
    wanted = np.arange(1, parts) * (int(total[-1]) / parts)
    # Text i belongs where its middle lies.
    bounds = np.searchsorted(total - np.asarray(lengths) / 2, wanted)
    numbers = np.arange(1, parts)
    # Ascending, with a text for every part before and behind.
    bounds = np.maximum.accumulate(np.maximum(bounds, numbers) - numbers) + numbers
    return np.minimum(bounds, count - parts + numbers).astype(np.int64)
