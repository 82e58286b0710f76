"""Exact search and scores of passages in memory, for tests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ckd_ray.retrieve.exact import Float32Array, Int64Array, Scorer, search_all
from ckd_ray.retrieve.int8 import FirstPass
from ckd_ray.retrieve.rows import FlatRows


class ExactIndex:
    """Exact search over passages held in memory.

    Args:
        embeddings_TD: rows of all passages, float16, passage after passage.
        lengths: (N,) rows of each passage.
        first: dense index of the first passage.
    """

    def __init__(
        self,
        embeddings_TD: Tensor,
        lengths: npt.NDArray[np.integer],
        first: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source, self.device = FlatRows(embeddings_TD, lengths, first), device

    def scores(self, queries_BQD: Tensor) -> Tensor:
        """(B, N) float32 scores of all passages, in the order of the corpus."""
        return Scorer(queries_BQD, self.source, self.device).dense(np.arange(self.source.num_passages))

    def search(
        self, queries_BQD: Tensor, depth: int, first_pass: FirstPass | None = None
    ) -> tuple[Float32Array, Int64Array]:
        """The best `depth`: (scores_BK, passages_BK), highest first, ties by passage index; -inf and -1 at the end.

        Args:
            first_pass: see `search_all`; the answer does not depend on it.
        """
        return search_all(Scorer(queries_BQD, self.source, self.device), depth, first_pass)


def rerank(
    queries_BQD: Tensor, candidates: list[Int64Array], rows_TD: Tensor, lengths: npt.NDArray[np.integer]
) -> list[Float32Array]:
    """float32 scores of each query's own candidates.

    Args:
        candidates: for each query, positions of passages.
        rows_TD, lengths: all passages, flat; only the candidates' rows are read.

    Returns:
        for each query the scores of its candidates, in their order.
    """
    query_P = np.repeat(np.arange(len(candidates)), [len(c) for c in candidates])
    passage_P = np.concatenate([np.empty(0, np.int64), *candidates]).astype(np.int64)
    scores_P = Scorer(queries_BQD, FlatRows(rows_TD, lengths), rows_TD.device).pairs(query_P, passage_P)
    return np.split(scores_P, np.cumsum([len(c) for c in candidates])[:-1]) if candidates else []
