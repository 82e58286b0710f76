"""Paired tests over queries, and intervals over queries and seeds.

Shapes: S seeds, N queries, R rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckd_ray.arrays import Float64Array

_NUMBERS = 1 << 22  # drawn at a time
_SEED, _ROUNDS = 17, 10_000


@dataclass(frozen=True)
class Difference:
    """The mean of b - a, p of the two-sided randomisation test, and the 95 % bootstrap interval of the mean."""

    mean: float
    p: float
    low: float
    high: float


def aligned(systems: Mapping[str, Mapping[str, float]]) -> dict[str, Float64Array]:
    """The values (N,) of each system, with the queries in one order.

    Args:
        systems: system -> query id -> value.

    Raises:
        ValueError: the systems were measured on different queries.
    """
    queries = list(next(iter(systems.values())))
    if any(values.keys() != set(queries) for values in systems.values()):
        raise ValueError(f"{', '.join(systems)} were not measured on the same queries")
    return {name: np.array([values[q] for q in queries], np.float64) for name, values in systems.items()}


def paired_difference(a: Float64Array, b: Float64Array) -> Difference:
    """Compare two systems on the same queries.

    The randomisation test (Fisher's paired test) flips the sign of every query's difference at random. p is the share
    of sign patterns, with the observed one, whose mean is at least as far from 0. The interval is that of
    `bootstrap_interval`.

    Args:
        a, b: values of the queries, in the same order: (N,), or (S, N) for S seeds, of which the test takes the mean.
            A system without seeds is (1, N).
    """
    if a.shape[-1:] != b.shape[-1:] or a.ndim != b.ndim or a.ndim not in (1, 2):
        raise ValueError(f"expected two lists of the same queries, got {a.shape} and {b.shape}")
    difference_SN = np.atleast_2d(b - a)
    difference = difference_SN.mean(0)
    if not len(difference):
        return Difference(0.0, 1.0, 0.0, 0.0)
    observed = float(difference.mean())
    rng = np.random.default_rng(_SEED)
    extreme = 0
    for count in _portions(len(difference)):
        signs = rng.integers(0, 2, (count, len(difference)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ difference) / len(difference) >= abs(observed) - 1e-12).sum())
    low, high = bootstrap_interval(difference_SN)
    return Difference(observed, (extreme + 1) / (_ROUNDS + 1), low, high)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction of the p of several comparisons, in their order.

    The k-th smallest of n (from 0) is multiplied by n - k. Corrected values keep the order of the p, and are at most 1.
    Findings with a corrected p below 0.05 bound the chance of any false finding among the n by 0.05.
    """
    corrected = [0.0] * len(ps)
    highest = 0.0
    for k, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - k) * ps[i]))
        corrected[i] = highest
    return corrected


def bootstrap_interval(values_SN: Float64Array) -> tuple[float, float]:
    """95 % percentile interval of the mean under resampling of both the seeds and the queries, with replacement.

    With one seed it is the plain bootstrap over queries. With few seeds their part is rough, but without it a lucky
    seed would look like an effect.
    """
    seeds, queries = values_SN.shape
    if not queries:
        return 0.0, 0.0
    rng = np.random.default_rng(_SEED)
    means = []
    for count in _portions(queries):
        weights_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), count) / seeds
        drawn_RN = rng.integers(0, queries, (count, queries))
        means.append(sum(weights_RS[:, s] * values_SN[s][drawn_RN].mean(1) for s in range(seeds)))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def _portions(queries: int) -> list[int]:
    """The rounds in portions, so that the random numbers of a portion take a few megabytes."""
    step = max(1, _NUMBERS // queries)
    return [min(step, _ROUNDS - start) for start in range(0, _ROUNDS, step)]
