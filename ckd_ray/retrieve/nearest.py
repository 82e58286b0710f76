"""The token embeddings nearest to each of many vectors: the voters of exact votes (method.md, step 4).

|v - r|^2 = |v|^2 - 2 (<v, r> - |r|^2 / 2), so the nearest rows have the highest *closeness* <v, r> - |r|^2 / 2. Where
the CPU is fast at it, a first pass in 8 bits (`int8.py`) bounds the highest closeness of each chunk of consecutive
rows. A chunk has a row that is at least as close as its lower bound. So the k-th highest lower bound is a threshold,
and the k nearest rows lie in chunks whose upper bound reaches it. The rows of those chunks are compared in float32.
Elsewhere all rows are. The answer is the same.

Shapes: M vectors, D dimensions, T rows, n chunks of a block, P pairs of a vector and a chunk, K results, C candidates.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ckd_ray.arrays import BoolArray, Int64Array
from ckd_ray.model.length_buckets import ranges
from ckd_ray.retrieve.int8 import (
    FirstPass,
    RoundedQueries,
    bound_factors,
    choose_first_pass,
    estimates_of,
    round_queries,
)
from ckd_ray.retrieve.rows import RangeRows

# Rows of a chunk. Larger chunks leave more rows to compare, smaller ones more maxima to look through.
_CHUNK = 16
# Vectors that are searched at a time, among so many rows: 64 MiB of distances, 1 GiB on a GPU, 8 MiB of bounds.
_VECTORS, _ROWS = 1 << 10, 1 << 14
_GPU_VECTORS, _GPU_ROWS = 1 << 12, 1 << 16
_VECTORS_INT8 = 1 << 11
# Rows of chunks that are compared at a time: 2 MiB of float32 at 128 dimensions, which stay in the cache.
_COMPARED = 1 << 12
# The first pass pays from so many vectors on, since rounding the rows costs the same for any number of them, and from
# so many rows on. A vector that has a larger share of all chunks left is compared with all rows instead.
_LEAST_VECTORS, _LEAST_ROWS, _MOST_KEPT = 256, 1 << 13, 1 / 24


def nearest_rows(
    vectors_MD: Tensor,
    source: RangeRows,
    k: int,
    block: int | None = None,
    device: torch.device | str = "cpu",
    first_pass: FirstPass | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows nearest to each vector: (squared distances (M, k), positions (M, k)), nearest first, ties by position.

    The top 2 k + 8 in float32 are ordered by distances in float64, so that the cut into blocks, shards and actors does
    not decide between almost equal ones. Lists of fewer than k rows end with +inf and -1.

    Args:
        vectors_MD: on the CPU, where the result is too.
        block: rows at a time, a multiple of 16.
        device: where the products are computed.
        first_pass: `int8` (on a CPU only) or `float32`, which give the same answer; None: the faster one here.
    """
    wide, device = 2 * k + 8, torch.device(device)
    if first_pass is None:
        few = len(vectors_MD) < _LEAST_VECTORS or source.num_rows < _LEAST_ROWS
        first_pass = "float32" if few or device.type != "cpu" else choose_first_pass()[0]
    if first_pass == "float32":
        where_MC = _nearest_of_all(vectors_MD, source, wide, block, device)
    else:
        none = torch.empty(0, wide, dtype=torch.int64)
        parts = vectors_MD.split(_VECTORS_INT8)
        where_MC = torch.cat([none, *(_nearest_by_bounds(part, source, k, wide, block or _ROWS) for part in parts)])
    return _sharpen(vectors_MD, source, where_MC, k)


def _nearest_of_all(
    vectors_MD: Tensor, source: RangeRows, wide: int, block: int | None = None, device: torch.device | None = None
) -> Tensor:
    """(M, wide) positions of the nearest rows, compared in float32 with all rows; -1 after the last."""
    device = device or torch.device("cpu")
    step, most = (_GPU_VECTORS, _GPU_ROWS) if device.type == "cuda" else (_VECTORS, _ROWS)
    block = block or most
    asked_MD = vectors_MD.to(device, torch.float32)
    best_MC = torch.full((len(vectors_MD), wide), torch.inf, device=device)
    where_MC = torch.full((len(vectors_MD), wide), -1, dtype=torch.int64, device=device)
    for start in range(0, source.num_rows, block):
        rows_TD = source.take(np.arange(start, min(source.num_rows, start + block))).to(device).float()
        norms_1T = rows_TD.square().sum(1)[None]
        for low in range(0, len(vectors_MD), step):
            part = slice(low, low + step)
            away_MT = torch.addmm(norms_1T, asked_MD[part], rows_TD.T, alpha=-2.0)
            near, at = away_MT.topk(min(wide, len(rows_TD)), dim=1, largest=False)
            merged, positions = torch.cat([best_MC[part], near], 1), torch.cat([where_MC[part], at + start], 1)
            best_MC[part], order = merged.topk(wide, dim=1, largest=False)
            where_MC[part] = positions.gather(1, order)
    return where_MC.cpu()


def _nearest_by_bounds(vectors_MD: Tensor, source: RangeRows, k: int, wide: int, block: int) -> Tensor:
    """`_nearest_of_all`, after a first pass in 8 bits; the k nearest rows are among the positions."""
    chunks, counts_M = _chunks_left(vectors_MD, source, k, block)
    where_MC = torch.full((len(vectors_MD), wide), -1, dtype=torch.int64)
    many = counts_M * _CHUNK > max(_CHUNK * wide, _MOST_KEPT * source.num_rows)
    if many.any():
        at = torch.from_numpy(np.flatnonzero(many))
        where_MC[at] = _nearest_of_all(vectors_MD[at], source, wide)
    ends_M = np.cumsum(counts_M)
    few = np.flatnonzero(~many)
    few = few[np.argsort(counts_M[few], kind="stable")]
    start = 0
    while start < len(few):
        # Vectors with about as many chunks each, until their rows fill the buffer.
        rows = counts_M[few[start:]] * _CHUNK * np.arange(1, len(few) - start + 1)
        stop = start + max(1, int(np.searchsorted(rows, _COMPARED, side="right")))
        part = few[start:stop]
        width = counts_M[part[-1]]
        within = np.minimum(np.arange(width)[None], counts_M[part][:, None] - 1)
        own = chunks[(ends_M - counts_M)[part][:, None] + within]
        positions = (own[:, :, None] * _CHUNK + np.arange(_CHUNK)).reshape(len(part), -1)
        absent = np.repeat(np.arange(width)[None] >= counts_M[part][:, None], _CHUNK, 1) | (
            positions >= source.num_rows
        )
        found = _nearest_of_some(vectors_MD[torch.from_numpy(part)], source, positions, absent, wide)
        where_MC[torch.from_numpy(part), : found.shape[1]] = found
        start = stop
    return where_MC


def _nearest_of_some(
    vectors_MD: Tensor, source: RangeRows, positions_MC: Int64Array, absent_MC: BoolArray, wide: int
) -> Tensor:
    """Positions of the nearest of each vector's own rows, at most `wide`; -1 where there is none."""
    inside = np.minimum(positions_MC, source.num_rows - 1).ravel()
    rows_MCD = source.take(inside).float().view(*positions_MC.shape, -1)
    norms_MC1 = torch.linalg.vector_norm(rows_MCD, dim=2, keepdim=True).square_()
    away_MC = torch.baddbmm(norms_MC1, rows_MCD, vectors_MD.float()[:, :, None], alpha=-2.0)[:, :, 0]
    away_MC.masked_fill_(torch.from_numpy(absent_MC), torch.inf)
    near, at = away_MC.topk(min(wide, away_MC.shape[1]), dim=1, largest=False)
    return torch.from_numpy(positions_MC).gather(1, at).masked_fill(near == torch.inf, -1)


def _chunks_left(vectors_MD: Tensor, source: RangeRows, k: int, block: int) -> tuple[Int64Array, Int64Array]:
    """The chunks that may hold one of a vector's k nearest rows: chunks (P,), vector after vector, and counts (M,)."""
    count = len(vectors_MD)
    queries = round_queries(vectors_MD[:, None], np.ones(count, np.int64))
    factors_3M = torch.stack([*bound_factors(queries), torch.ones(count)])
    best_MK = torch.full((count, k), -torch.inf)
    vector, chunk, upper = [], [], []
    for start in range(0, source.num_rows, block):
        high_nM, sizes_n3, ranges_n = _bounds(queries, factors_3M, source, start, min(source.num_rows, start + block))
        if start == 0:  # nothing is known yet, so that all chunks would be left
            low_nM = high_nM - 2 * sizes_n3[:, :2] @ factors_3M[:2] - ranges_n[:, None]
            best_MK = torch.cat([best_MK, low_nM.T], 1).topk(k, dim=1).values
        n, m = (high_nM >= best_MK[:, -1]).nonzero(as_tuple=True)
        order = m.argsort(stable=True)
        n, m = n[order], m[order]
        high = high_nM[n, m]
        if start and len(m):
            low = high - 2 * (sizes_n3[n, :2] * factors_3M.T[m, :2]).sum(1) - ranges_n[n]
            best_MK = torch.cat([best_MK, _padded(low, m, count)], 1).topk(k, dim=1).values
        vector.append(m)
        chunk.append(n + start // _CHUNK)
        upper.append(high)
    m, n, high = torch.cat(vector), torch.cat(chunk), torch.cat(upper)
    left = high >= best_MK[m, -1]
    vector_P, chunk_P = m[left].numpy(), n[left].numpy()
    return chunk_P[np.argsort(vector_P, kind="stable")], np.bincount(vector_P, minlength=count)


def _bounds(
    queries: RoundedQueries, factors_3M: Tensor, source: RangeRows, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of the highest closeness of the chunks of rows [start, stop). The last row fills up the last chunk.

    Returns:
        (n, M) upper bounds; (n, 3) what makes an upper bound of an estimate, a product with factors_3M; and (n,) the
        range of |r|^2 / 2. A lower bound is the upper one less the range and less twice the first two products.
    """
    count = -(-(stop - start) // _CHUNK)
    rows_TD = source.take(np.minimum(np.arange(start, start + count * _CHUNK), stop - 1))
    half_norms_nL = torch.linalg.vector_norm(rows_TD.float(), dim=1).square_().div_(2).view(count, _CHUNK)
    # The norms are computed in float32 as well, hence 1e-5.
    shortest_n, longest_n = half_norms_nL.amin(1) * (1 - 1e-5), half_norms_nL.amax(1) * (1 + 1e-5)
    estimates_nM, sizes_n3 = torch.empty(count, factors_3M.shape[1]), torch.empty(count, 3)
    sizes_n3[:, 2] = -shortest_n
    for these, estimates, sizes_n3[these, 0], sizes_n3[these, 1] in estimates_of(queries, rows_TD, _CHUNK):
        estimates_nM[these] = estimates
    return estimates_nM.addmm_(sizes_n3, factors_3M), sizes_n3, longest_n - shortest_n


def _padded(values_P: Tensor, vector_P: Tensor, count: int) -> Tensor:
    """(M, most) the values of each vector, -inf after its last; vectors ascend."""
    counts = torch.bincount(vector_P, minlength=count).numpy()
    padded = torch.full((count, int(counts.max())), -torch.inf)
    padded[vector_P, torch.from_numpy(ranges(np.zeros(count, np.int64), counts))] = values_P
    return padded


def _sharpen(vectors_MD: Tensor, source: RangeRows, where_MC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of some rows each: (squared distances (M, k) float32, positions (M, k)), computed in float64.

    Args:
        where_MC: positions of rows, -1 for none.
    """
    distances, positions = [], []
    step = max(1, (1 << 22) // max(1, where_MC.shape[1] * vectors_MD.shape[1]))
    for vectors, where in zip(vectors_MD.split(step), where_MC.split(step), strict=True):
        absent = where < 0
        rows = source.take(where.clamp(min=0).flatten().numpy()).double().view(*where.shape, -1)
        away = (rows - vectors[:, None].double()).square().sum(-1).float().masked_fill(absent, torch.inf)
        place = where.masked_fill(absent, torch.iinfo(torch.int64).max)
        # Two stable sorts: by position, then by distance.
        first = place.argsort(dim=1, stable=True)
        order = first.gather(1, away.gather(1, first).argsort(dim=1, stable=True))[:, :k]
        distances.append(away.gather(1, order))
        positions.append(where.gather(1, order))
    empty = vectors_MD.new_empty(0, k), torch.empty(0, k, dtype=torch.int64)
    return torch.cat([empty[0], *distances]), torch.cat([empty[1], *positions])
