"""k-means and the nearest points of centroids in C (`_native.c`), built where the installation finds a compiler.

k-means takes a quarter of torch's time, labels half (docs/log.md). Without the library, or with CKD_RAY_NATIVE=0,
`available` is False and kmeans.py and expand.py compute in torch. Shapes: see kmeans.py; V neighbours.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ckd_ray.native import LONG, POINTER, in_threads, load_library

_ARGUMENTS = {
    "ckd_ray_kmeans": [POINTER] * 4 + [LONG] * 5 + [POINTER] * 4,
    "ckd_ray_nearest": [POINTER] * 3 + [LONG] * 5 + [POINTER],
}


@lru_cache(maxsize=1)
def _library() -> Any:
    """The built library, or None."""
    return load_library(__file__, _ARGUMENTS)


def available(points_BTD: Tensor) -> bool:
    """Whether these points can be clustered here: float32 on a CPU."""
    return points_BTD.device.type == "cpu" and points_BTD.dtype == torch.float32 and _library() is not None


def vector_bits(most: int = 512) -> int:
    """Use vector instructions of at most `most` bits (128, 256, 512). Returns the width that is then used."""
    return int(_library().ckd_ray_vector_bits(most))


def kmeans(
    points_BTD: Tensor,
    mask_BT: Tensor,
    mask_BK: Tensor,
    threshold_B: Tensor,
    max_iterations: int,
    centroids_BKD: Tensor,
    labels_BT: Tensor,
    sizes_BK: Tensor,
    iterations_B: Tensor,
) -> None:
    """`ckd_ray.collective.kmeans.kmeans`; writes to the last four arguments. `centroids_BKD` holds the start."""
    (B, T, D), K = points_BTD.shape, centroids_BKD.shape[1]
    points_BTD, mask_BT, mask_BK = points_BTD.contiguous(), mask_BT.contiguous(), mask_BK.contiguous()
    threshold_B = threshold_B.float().contiguous()

    def part(first: int, count: int) -> int:
        inputs = (points_BTD, mask_BT, mask_BK, threshold_B)
        outputs = (centroids_BKD, labels_BT, sizes_BK, iterations_B)
        return int(_library().ckd_ray_kmeans(*_at(inputs, first), count, T, K, D, max_iterations, *_at(outputs, first)))

    in_threads(part, B, "k-means")


def nearest(points_BTD: Tensor, mask_BT: Tensor, centroids_BKD: Tensor, voters: int) -> Tensor:
    """Rows (B, K, V), int64, of the points nearest to each centroid, nearest first; -1 for none."""
    (B, T, D), K = points_BTD.shape, centroids_BKD.shape[1]
    points_BTD, mask_BT, centroids_BKD = points_BTD.contiguous(), mask_BT.contiguous(), centroids_BKD.contiguous()
    rows_BKV = torch.empty((B, K, voters), dtype=torch.int64)

    def part(first: int, count: int) -> int:
        inputs = (points_BTD, mask_BT, centroids_BKD)
        return int(_library().ckd_ray_nearest(*_at(inputs, first), count, T, K, D, voters, *_at((rows_BKV,), first)))

    in_threads(part, B, "k-means")
    return rows_BKV


def _at(arrays: tuple[Tensor, ...], first: int) -> list[int]:
    """Addresses of row `first`."""
    return [array.data_ptr() + first * array.stride(0) * array.element_size() for array in arrays]
