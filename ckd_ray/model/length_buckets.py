"""Length bucketing: texts of like length are encoded together, so that little of an encoder's work is padding.

Shapes: N texts, L tokens of the longest text of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch

from ckd_ray.arrays import Int32Array, Int64Array, IntArray
from ckd_ray.progress import say

# What one more group costs, in padded tokens: kernels that start, and smaller matrix products.
OVERHEAD, GPU_OVERHEAD = 256, 4096
_MOST_GROUPS = 4
# Padded tokens of a batch: on a CPU, on a GPU at least, and on a large GPU.
CPU_TOKENS, GPU_TOKENS, _MOST_TOKENS = 1440, 8192, 131_072
_WIDTHS = 32


def default_token_budget(device: torch.device) -> int:
    """Padded tokens a batch of an encoder that has the device for itself.

    On a CPU a small batch leaves its activations in the cache for the next layer: MiniLM took 30.7 ms a passage with
    1,440 tokens and 36.9 ms with 8,192 (docs/log.md).
    """
    if device.type == "cpu":
        return CPU_TOKENS
    return gpu_token_budget(torch.cuda.get_device_properties(device).total_memory / 2**30)


def gpu_token_budget(gib: float) -> int:
    """The same on a GPU of so much memory: the power of two up to 2,048 tokens a GiB, between 8,192 and 131,072.

    Starting the kernels of a batch takes as long whatever its size, and a fast GPU computes 8,192 tokens in that time.
    BERT-base's activations take about 30 KB a token in bfloat16, so that a sixteenth of the memory is used.
    """
    return int(min(_MOST_TOKENS, max(GPU_TOKENS, 2 ** math.floor(math.log2(max(1.0, 2048 * gib))))))


def token_budget_batches(lengths: IntArray, budget: int, multiple: int = 1) -> Iterator[Int32Array]:
    """Indices of texts, shortest first, in batches of at most `budget` tokens, padding included.

    A text longer than the budget is a batch of its own.

    Args:
        multiple: what L is rounded up to.
    """
    order = np.argsort(lengths, kind="stable").astype(np.int32)
    widths = -(-np.maximum(lengths[order], 1) // multiple) * multiple
    start = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or int(widths[i]) * (i + 1 - start) > budget:
            yield order[start:i]
            start = i


def each_batch(lengths: IntArray, budget: int, multiple: int, compute: Callable[[Int32Array], None]) -> int:
    """Call `compute` on the batches of `token_budget_batches`. From the first one on that a GPU's memory does not hold,
    batches have half of the budget, and half again if need be.

    Args:
        compute: has done nothing where it raises an error.

    Returns:
        the budget at the end.

    Raises:
        torch.OutOfMemoryError: the memory does not hold one text alone.
    """
    waiting = list(token_budget_batches(lengths, budget, multiple))[::-1]
    while waiting:
        try:
            compute(waiting[-1])
            waiting.pop()
            continue
        except torch.OutOfMemoryError:
            if len(waiting[-1]) == 1:
                raise
        # Not in the block above, where the error keeps the batch's memory.
        left = np.concatenate(waiting[::-1])
        budget = int(lengths[waiting[-1]].max()) * len(waiting[-1]) // 2
        free_gpu_memory()
        say(f"a GPU's memory does not hold a batch of {2 * budget:,} tokens; batches have {budget:,} from here on")
        waiting = [left[batch] for batch in token_budget_batches(lengths[left], budget, multiple)][::-1]
    return budget


def free_gpu_memory() -> None:
    """Give back what PyTorch keeps of a GPU's memory for later use, so that blocks of other sizes fit."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def length_groups(lengths: IntArray, overhead: int = OVERHEAD) -> list[Int64Array]:
    """Indices of texts in at most four groups, shortest first, that together have the fewest padded tokens.

    Each group counts as `overhead` tokens more. Bounds between groups lie on a grid of 32 widths; dynamic programming
    finds the best ones.
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
    # cost[i]: the fewest tokens of all texts up to end i, with the groups used so far; back: where the last one began.
    cost = np.append(0, np.full(len(ends), np.inf))
    best, bounds = np.inf, [0, len(ends)]
    back: list[Int64Array] = []
    for _ in range(min(_MOST_GROUPS, len(ends))):
        total = cost[:-1, None] + width[None] * (ends[None] - starts[:-1, None]) + overhead
        total[np.arange(len(ends))[:, None] > np.arange(len(ends))[None]] = np.inf
        back.append(total.argmin(0))
        cost = np.append(np.inf, total.min(0))
        if cost[-1] < best:
            best, bounds = float(cost[-1]), [len(ends)]
            for row in reversed(back):
                bounds.insert(0, int(row[bounds[0] - 1]))
    return [order[starts[a] : starts[b]] for a, b in pairwise(bounds)]


def even_parts(lengths: IntArray, parts: int) -> list[Int64Array]:
    """Indices of texts, shortest first, in `parts` parts of about as many tokens each, none of them empty.

    Raises:
        ValueError: there are fewer texts than parts.
    """
    count = len(lengths)
    if count < parts:
        raise ValueError(f"{parts} parts of {count} texts")
    order = np.argsort(lengths, kind="stable")
    ascending = np.asarray(lengths)[order]
    total = np.cumsum(ascending, dtype=np.int64)
    numbers = np.arange(1, parts)
    # A text belongs to the part that holds its middle.
    bounds = np.searchsorted(total - ascending / 2, numbers * (int(total[-1]) / parts))
    # Ascending, with a text for every part before and behind.
    bounds = np.maximum.accumulate(np.maximum(bounds, numbers) - numbers) + numbers
    return np.split(order, np.minimum(bounds, count - parts + numbers))


def ranges(starts: IntArray, counts: IntArray) -> Int64Array:
    """The numbers starts[i], starts[i] + 1, ..., counts[i] of them, one range after the other."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - ends + counts, counts)
