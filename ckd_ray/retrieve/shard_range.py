"""Search over a range of shards of a store: what one actor owns. No Ray here.

Shapes: B queries, Q rows, D dimensions, K results, M vectors, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ckd_ray.retrieve.exact import ExactIndex, nearest_rows, rerank
from ckd_ray.retrieve.faiss_index import TokenIndex, candidate_passages
from ckd_ray.retrieve.merge import merge_top
from ckd_ray.store import EmbeddingStore

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

# Exact search is taken up to this much work: about 10 minutes on two cores.
_EXACT_OPERATIONS = 6e13


def choose_engine(num_queries: int, query_rows: int, num_tokens: int, dim: int) -> str:
    """`exact` while all queries against all token embeddings are within 6e13 multiplications and additions, else
    `faiss`."""
    return "exact" if 2.0 * num_queries * query_rows * num_tokens * dim <= _EXACT_OPERATIONS else "faiss"


class ShardRange:
    """Consecutive shards of a store, loaded and verified.

    Args:
        shards: indices of consecutive shards.
        engine: `exact`, or `faiss` (IVF-PQ for candidates, exact scores for these).
        candidates: nearest embeddings a query row, for faiss.
        rerank_factor: faiss candidates that are scored exactly, as a multiple of the depth.

    Raises:
        BrokenShardError: a shard's bytes do not match its checksum.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        shards: Sequence[int],
        *,
        engine: str = "exact",
        cells: int | str = "auto",
        nprobe: int = 32,
        candidates: int = 1024,
        seed: int = 17,
        rerank_factor: int = 4,
    ) -> None:
        opened = [store.shard(i) for i in shards]
        for shard in opened:
            shard.verify()
        self.first = opened[0].first if opened else 0
        self.lengths = np.concatenate([s.lengths for s in opened] or [np.empty(0, np.int32)]).astype(np.int64)
        self.token_ids = np.concatenate([s.token_ids for s in opened] or [np.empty(0, np.int32)])
        # The number of this range's first embedding in the whole store, which orders equal distances.
        self.first_token = sum(store.shard_tokens(i) for i in range(shards[0])) if opened else 0
        empty = torch.empty(0, store.dim, dtype=torch.float16)
        rows_TD = torch.cat([empty, *(s.embeddings() for s in opened)])
        self.engine, self._candidates, self._rerank_factor = engine, candidates, rerank_factor
        self.rows_TD = rows_TD
        if engine == "exact":
            self._exact = ExactIndex(rows_TD, self.lengths, self.first)
        else:
            self._index = TokenIndex(rows_TD, cells=cells, nprobe=nprobe, seed=seed)
            self._passage_of = np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)

    @property
    def num_passages(self) -> int:
        """Passages of this range."""
        return len(self.lengths)

    def search(self, queries_BQD: Tensor, depth: int) -> tuple[Float32Array, Int64Array]:
        """The best `depth` passages of this range: scores_BK and dense indices, highest first; -inf and -1 behind the
        end."""
        if self.engine == "exact":
            return self._exact.search(queries_BQD, depth)
        flat = queries_BQD.reshape(-1, queries_BQD.shape[2])
        distances, positions = self._index.nearest(flat, self._candidates)
        shape = (len(queries_BQD), queries_BQD.shape[1], -1)
        limit = max(256, self._rerank_factor * depth)
        chosen = [
            candidate_passages(d, p, self._passage_of, limit)
            for d, p in zip(distances.reshape(shape), positions.reshape(shape), strict=True)
        ]
        scores = rerank(queries_BQD, chosen, self.rows_TD, self.lengths)
        rows = [merge_top([(s[None], c[None] + self.first)], depth) for s, c in zip(scores, chosen, strict=True)]
        return np.concatenate([s for s, _ in rows]), np.concatenate([p for _, p in rows])

    def nearest_token_ids(self, vectors_MD: Tensor, k: int) -> tuple[Float32Array, Int64Array, Int64Array]:
        """The k nearest token embeddings: squared distances, their vocabulary ids, and their positions in the whole
        store."""
        if self.engine == "exact":
            found, at = nearest_rows(vectors_MD, self.rows_TD, k)
            distances, positions = found.cpu().numpy(), at.cpu().numpy()
        else:
            distances, positions = self._index.nearest(vectors_MD, k)
        present = positions >= 0
        safe = np.where(present, positions, 0)
        token_ids = self.token_ids[safe] if len(self.token_ids) else np.zeros_like(safe)
        return (
            distances.astype(np.float32),
            np.where(present, token_ids, -1).astype(np.int64),
            np.where(present, positions + self.first_token, np.iinfo(np.int64).max),
        )
