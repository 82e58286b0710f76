"""Is a difference more than chance? Paired tests over queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """mean of b - a; p of the two-sided randomisation test; low and high of the 95 % bootstrap interval of the mean."""

    mean: float
    p: float
    low: float
    high: float


def paired_difference(a: FloatArray, b: FloatArray, *, seed: int = 17, rounds: int = 10_000) -> Difference:
    """Compare two systems on the same queries.

    Randomisation (Fisher's paired test): under chance the sign of every query's difference is free, so p is the share
    of random sign patterns whose mean is at least as far from 0, with the observed one counted in. Bootstrap:
    percentiles of the mean over queries drawn with replacement.

    Args:
        a, b: values of the queries, in the same order.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected two lists of the same queries, got {a.shape} and {b.shape}")
    difference = b - a
    if not len(difference):
        return Difference(0.0, 1.0, 0.0, 0.0)
    observed = float(difference.mean())
    rng = np.random.default_rng(seed)
    extreme, means = 0, []
    step = max(1, (1 << 22) // len(difference))
    for start in range(0, rounds, step):
        count = min(step, rounds - start)
        signs = rng.integers(0, 2, (count, len(difference)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ difference) / len(difference) >= abs(observed) - 1e-12).sum())
        drawn = rng.integers(0, len(difference), (count, len(difference)))
        means.append(difference[drawn].mean(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Difference(observed, (extreme + 1) / (rounds + 1), float(low), float(high))
