"""A first pass of exact search in 8 bits: an estimate of every score, with a proven bound of its error.

Rows are rounded to integers from -127 to 127. Each query row has its scale, and each passage has one scale, so that the
maximum over a passage can be computed from the integers. Products of integers have no error. The rounding errors are
computed, not assumed: q = q' + r and d = d' + e, where q' and d' are the rounded rows, give

    |<q, d> - <q', d'>| = |<r, d> + <q', e>| <= |r| |d| + |q'| |e|   (Cauchy-Schwarz).

The error of a maximum over rows d is at most the largest of their errors, and a score's at most the sum over q. Hence

    |score - estimate| <= sum_q |r| * max_d |d| + sum_q |q'| * max_d |e|:

two numbers a query times two numbers a passage. The bound holds for the worst case, in which all errors have one sign.

Shapes: B queries, Q rows of the longest query, R query rows, N passages, n passages of a group, L rows a passage, D
dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ckd_ray.arrays import Int64Array
from ckd_ray.retrieve.query_blocks import QueryBlock, blocks_of

FirstPass = Literal["int8", "float32"]

_LARGEST = 127.0
# Numbers of a block of int32 products: 4 MiB, which stay in the cache until their maxima are taken.
_BLOCK = 1 << 20
# Query rows of a block: 256 KiB of int8.
_COLUMNS = 2048
# Rows that are rounded at a time: 512 KiB of float32 at 128 dimensions.
_ROUNDED = 1 << 10
# No scale is smaller, so that rows of zeros have one; float16 holds no number that needs a smaller one.
_LEAST_SCALE = 2.0**-40
# The first pass in 8 bits is used where its products are so many times faster than those in float32.
_WORTHWHILE = 1.5


@dataclass(frozen=True)
class RoundedQueries:
    """Queries in 8 bits.

    Attributes:
        blocks: queries of about equal length, and of each block the rows (R, D) int8 and (R,) what a number of a row
            stands for.
        query_rows, dim: Q and D.
        lost_B: sum over a query's rows of |r|, the length of the rounding error.
        kept_B: sum over its rows of |q'|, the length of the rounded row.
        whole_B: sum over its rows of |q|.
    """

    blocks: list[tuple[QueryBlock, Tensor, Tensor]]
    query_rows: int
    dim: int
    lost_B: Tensor
    kept_B: Tensor
    whole_B: Tensor


def round_queries(queries_BQD: Tensor, lengths_B: Int64Array) -> RoundedQueries:
    """Rounds float16 queries, each row with a scale of its own.

    Args:
        lengths_B: rows of each query that count; zeros are behind them.
    """
    count, query_rows, dim = queries_BQD.shape
    lost_B, kept_B, whole_B = torch.zeros(count), torch.zeros(count), torch.zeros(count)
    blocks = []
    for block in blocks_of(lengths_B, _COLUMNS):
        rows_RD = block.rows_of(queries_BQD).float()
        codes_RD, scales_R = _rounded(rows_RD)
        held_RD = codes_RD.double() * scales_R[:, None].double()
        for out_B, x in ((lost_B, rows_RD.double() - held_RD), (kept_B, held_RD), (whole_B, rows_RD.double())):
            out_B[block.queries] = x.norm(dim=1).view(-1, block.length).sum(1).float()
        blocks.append((block, _as_int8(codes_RD), scales_R))
    return RoundedQueries(blocks, query_rows, dim, lost_B, kept_B, whole_B)


def _rounded(rows_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (as float32) and scales (R,), a scale for every row of rows_RK."""
    # A norm of order infinity takes twenty times as long.
    scales_R = (torch.maximum(rows_RK.amax(1), -rows_RK.amin(1)) / _LARGEST).clamp_(min=_LEAST_SCALE)
    return (rows_RK * scales_R.reciprocal()[:, None]).round_(), scales_R


def _as_int8(codes_RD: Tensor) -> Tensor:
    """Codes for a product. A lone column gets one of zeros beside it: PyTorch's product is wrong for rows of one
    number, whose strides do not tell rows from columns."""
    codes_RD = codes_RD.to(torch.int8)
    return codes_RD if codes_RD.shape[1] > 1 else F.pad(codes_RD, (0, 1))


def estimates_of(
    queries: RoundedQueries, rows_TD: Tensor, length: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Estimates of all queries with passages of `length` rows each.

    Args:
        rows_TD: (n * length, D) float16, passage after passage.

    Yields:
        a slice of the n passages; their estimates (part of n, B); the greatest length of their rows and of the rounding
        errors of these (part of n,). All float32.
    """
    dim, count = rows_TD.shape[1], len(queries.lost_B)
    columns = max((len(asked_RD) for _, asked_RD, _ in queries.blocks), default=0)
    inner = max(1, min(_ROUNDED // length, _BLOCK // (length * max(1, columns))))
    step = inner * max(1, _ROUNDED // (inner * length))
    products = torch.empty(inner * length * columns, dtype=torch.int32)
    for start in range(0, len(rows_TD) // length, step):
        rows_nLD = rows_TD[start * length : (start + step) * length].float().view(-1, length, dim)
        n = len(rows_nLD)
        codes_nLD, scales_n = _rounded(rows_nLD.view(n, -1))
        codes_nLD = codes_nLD.view(n, length, dim)
        codes_TD = _as_int8(codes_nLD.view(-1, dim))
        longest_n = torch.linalg.vector_norm(rows_nLD, dim=2).amax(1)
        lost_nLD = rows_nLD.addcmul_(codes_nLD, scales_n[:, None, None], value=-1.0)
        most_lost_n = torch.linalg.vector_norm(lost_nLD, dim=2).amax(1)
        scores_nB = torch.empty(n, count)
        for query_block, asked_RD, scales_R in queries.blocks:
            best_nR = torch.empty(n, len(asked_RD), dtype=torch.int32)
            for first in range(0, n, inner):
                some = codes_TD[first * length : (first + inner) * length]
                block = products[: len(some) * len(asked_RD)].view(len(some), -1)
                torch._int_mm(some, asked_RD.T, out=block)
                torch.amax(block.view(-1, length, block.shape[1]), 1, out=best_nR[first : first + inner])
            scores_nB[:, query_block.queries] = (best_nR * scales_R).view(n, -1, query_block.length).sum(2)
        scores_nB *= scales_n[:, None]
        yield slice(start, start + n), scores_nB, longest_n, most_lost_n


def bounds_of(queries: RoundedQueries, longest_N: Tensor, most_lost_N: Tensor) -> Tensor:
    """(B, N) float32 bounds of the errors of estimates, from the lengths that `estimates_of` yields."""
    of_longest_B, of_lost_B = bound_factors(queries)
    return torch.outer(of_longest_B, longest_N).addr_(of_lost_B, most_lost_N)


def bound_factors(queries: RoundedQueries) -> tuple[Tensor, Tensor]:
    """What a bound is a multiple of: (B,) of the greatest length of a passage's rows, (B,) of the greatest length of
    their rounding errors. The bound is the sum of both products."""
    # Estimates and lengths are themselves computed in float32, with u = 2^-24. Their error for a query row is at most
    # (1.5 D + 4 Q + 48) u |q| |d|; the slack is (8 D + 8 Q + 64) u |q| |d|.
    slack = (queries.dim + queries.query_rows + 8) * 2.0**-21
    return queries.lost_B + slack * queries.whole_B, queries.kept_B


@lru_cache(maxsize=1)
def choose_first_pass() -> tuple[FirstPass, str]:
    """`int8` or `float32` for exact search on this machine's processor, and the reason.

    8 bits are used where a product with its maxima is at least 1.5 times as fast as in float32 and has no error.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # every thread of a search has its own products
    try:
        if not has_exact_products():
            return "float32", "PyTorch has no exact product in 8 bits for this processor"
        ratio = _measured_ratio()
    finally:
        torch.set_num_threads(before)
    return ("int8" if ratio >= _WORTHWHILE else "float32"), f"measured here: int8 at {ratio:.2f} x the rate of float32"


def has_exact_products() -> bool:
    """Whether products of int8 are computed here, and without error.

    Processors without instructions for it may add two products in 16 bits, which the largest sums overflow.
    """
    codes = torch.randint(-127, 128, (64, 128), generator=torch.Generator().manual_seed(0))
    codes[:16], codes[16:32] = 127, -127
    small = codes.to(torch.int8)
    try:
        return torch.equal(torch._int_mm(small, small.T).double(), codes.double() @ codes.double().T)
    except (AttributeError, RuntimeError):
        return False


def _measured_ratio() -> float:
    """Processor time of a float32 product with its maxima over that of an int8 one: the best of eight, in turn."""
    rows, columns, dim, length = 256, 2016, 128, 64
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (rows + columns, dim), generator=generator)
    seconds: dict[torch.dtype, float] = {}
    for _ in range(9):  # the first one warms up
        for dtype in (torch.int8, torch.float32):
            rows_TD, asked_RD = codes.to(dtype).split([rows, columns])
            products = torch.empty(rows, columns, dtype=torch.int32 if dtype == torch.int8 else dtype)
            start = time.thread_time()
            (torch._int_mm if dtype == torch.int8 else torch.mm)(rows_TD, asked_RD.T, out=products)
            products.view(-1, length, columns).amax(1)
            seconds[dtype] = min(seconds.get(dtype, float("inf")), time.thread_time() - start)
    return seconds[torch.float32] / seconds[torch.int8]
