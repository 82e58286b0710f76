"""Search over a range of shards of a store: what one actor owns. No Ray here.

Shapes: B queries, Q rows, D dimensions, K results, N candidates, M vectors, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ckd_ray.arrays import Float32Array, Int32Array, Int64Array
from ckd_ray.retrieve.centroids import CentroidIndex
from ckd_ray.retrieve.exact import Scorer, search_all, search_among
from ckd_ray.retrieve.faiss_index import TokenIndex, candidate_passages
from ckd_ray.retrieve.nearest import nearest_rows
from ckd_ray.retrieve.rows import ShardRows
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.codec import RESIDUAL_BITS, Residual

# `choose_engine` chooses exact search up to this much work: about 10 minutes on two cores.
_EXACT_OPERATIONS = 6e13
# Passages of faiss' candidates that are scored exactly, as a multiple of the depth. On MedQuAD 4 times give a
# recall@100 of 0.930, 8 times 0.974, 16 times 0.991, and all of them, 46 times, 0.999 (docs/log.md).
RERANK_FACTOR, _LEAST_RERANKED = 16, 1024
# A range of fewer rows is searched exactly under engine faiss: there is nothing to train product quantisers on.
_LEAST_INDEXED = 1000


@dataclass(frozen=True)
class SearchSettings:
    """How candidates are found.

    Attributes:
        engine: `exact`, `centroids` (of a residual codec) or `faiss` (IVF-PQ).
        cells: inverted lists of faiss.
        nprobe: cells (faiss) or centroids probed by a query row.
        candidates: faiss: nearest embeddings of a query row, whose passages are scored exactly (at most
            `RERANK_FACTOR` times the depth of them); centroids: passages of a query that are scored exactly.
        index: file in which a faiss index is kept between stages; None: built each time.
    """

    engine: str
    cells: int | str = "auto"
    nprobe: int = 32
    candidates: int = 1024
    seed: int = 17
    index: str | None = None


def choose_engine(num_queries: int, query_rows: int, num_tokens: int, dim: int, codec: str = "fp16") -> str:
    """`exact` while all queries against all token embeddings are within 6e13 multiplications and additions; else
    `centroids` where the store has them, else `faiss`."""
    if 2.0 * num_queries * query_rows * num_tokens * dim <= _EXACT_OPERATIONS:
        return "exact"
    return "centroids" if codec in RESIDUAL_BITS else "faiss"


class ShardRange:
    """Consecutive shards of a store, verified and mapped; rows are read (and decoded) when they are asked for.

    Args:
        shards: indices of consecutive shards.
        device: where products are computed.
        processes: how many processes of this machine, this one included, serve as many shards each.

    Raises:
        BrokenShardError: a shard's bytes do not match its checksum.
        UserError: copies of remote shards have no room here (`EmbeddingStore.check_room`).
    """

    def __init__(
        self,
        store: EmbeddingStore,
        shards: Sequence[int],
        settings: SearchSettings,
        device: str = "cpu",
        processes: int = 1,
    ) -> None:
        store.check_room(shards, processes)
        opened = [store.shard(i) for i in shards]
        for shard in opened:
            shard.verify()
        self.settings, self.device = settings, device
        self.rows = ShardRows(opened, store.dim)
        # The number of this range's first embedding in the whole store, which orders equal distances.
        self.first_token = sum(store.shard_tokens(i) for i in range(shards[0])) if opened else 0
        self._faiss: TokenIndex | None = None
        self._centroids: CentroidIndex | None = None
        if settings.engine == "faiss" and self.rows.num_rows >= _LEAST_INDEXED:
            self._faiss = TokenIndex(
                self.rows, cells=settings.cells, nprobe=settings.nprobe, seed=settings.seed, kept=settings.index
            )
            self._passage_of = np.repeat(np.arange(self.rows.num_passages, dtype=np.int32), self.rows.lengths)
        elif settings.engine == "centroids" and opened:
            codec = opened[0].codec
            assert isinstance(codec, Residual), "engine centroids needs a residual codec"
            self._centroids = CentroidIndex(self.rows, codec, settings.nprobe, device)

    def check_unchanged(self) -> None:
        """Raises BrokenShardError when a file was changed in place under this range: its answers may be wrong."""
        for shard in self.rows.shards:
            shard.check_unchanged()

    @property
    def num_passages(self) -> int:
        """Passages of this range."""
        return self.rows.num_passages

    def search(self, queries_BQD: Tensor, depth: int, effort: int = 1) -> tuple[Float32Array, Int64Array]:
        """The best `depth` passages of this range: scores_BK and dense indices, highest first, -inf and -1 at the end.

        Engine `centroids` chooses candidates of this range alone; `ServerGroup` chooses those of all ranges together.

        Args:
            effort: `nprobe` and `candidates` are multiplied by it, and the passages that are scored exactly.
        """
        if self._centroids is not None:
            limit = max(depth, self.settings.candidates * effort)
            _, passages_BN = self.candidates(*self.probes(queries_BQD, effort), limit)
            return self.score(queries_BQD, passages_BN, depth)
        scorer = Scorer(queries_BQD, self.rows, self.device)
        if self._faiss is None:
            return search_all(scorer, depth)
        flat = scorer.queries_BQD.float().cpu().reshape(-1, scorer.dim)
        distances, positions = self._faiss.nearest(flat, self.settings.candidates * effort, effort)
        shape = (len(queries_BQD), queries_BQD.shape[1], -1)
        limit = max(_LEAST_RERANKED, RERANK_FACTOR * depth) * effort
        chosen = [
            candidate_passages(d, p, self._passage_of, limit)
            for d, p in zip(distances.reshape(shape), positions.reshape(shape), strict=True)
        ]
        return search_among(scorer, chosen, depth)

    def search_exactly(self, queries_BQD: Tensor, depth: int) -> tuple[Float32Array, Int64Array]:
        """`search` over all passages, whatever the engine."""
        return search_all(Scorer(queries_BQD, self.rows, self.device), depth)

    def probes(self, queries_BQD: Tensor, effort: int = 1) -> tuple[Int32Array, Float32Array]:
        """Engine `centroids`: the centroids that each query row probes, the same in every range."""
        assert self._centroids is not None
        return self._centroids.probes(queries_BQD, effort)

    def candidates(
        self, ids_BQC: Int32Array, similarity_BQC: Float32Array, limit: int
    ) -> tuple[Float32Array, Int64Array]:
        """Engine `centroids`: estimates and dense passage indices of this range's candidates, best first."""
        assert self._centroids is not None
        return self._centroids.candidates(ids_BQC, similarity_BQC, limit)

    def score(self, queries_BQD: Tensor, passages_BN: Int64Array, depth: int) -> tuple[Float32Array, Int64Array]:
        """The best `depth` of those of passages_BN (dense indices; -1: none) that lie in this range."""
        local_BN = passages_BN - self.rows.first
        inside_BN = (passages_BN >= 0) & (local_BN >= 0) & (local_BN < self.num_passages)
        chosen = [local[inside] for local, inside in zip(local_BN, inside_BN, strict=True)]
        return search_among(Scorer(queries_BQD, self.rows, self.device), chosen, depth)

    def nearest_token_ids(self, vectors_MD: Tensor, k: int) -> tuple[Float32Array, Int64Array, Int64Array]:
        """The k nearest token embeddings: squared distances, vocabulary ids, and positions in the whole store. Lists
        end with +inf, -1 and the largest number. Those of faiss' index where there is one; else the exact ones."""
        if self._faiss is not None:
            distances, positions = self._faiss.nearest(vectors_MD, k)
        else:
            found, at = nearest_rows(vectors_MD, self.rows, k, device=self.device)
            distances, positions = found.cpu().numpy(), at.cpu().numpy()
        present = positions >= 0
        token_ids = self._token_ids(np.where(present, positions, 0))
        return (
            distances.astype(np.float32),
            np.where(present, token_ids, -1).astype(np.int64),
            np.where(present, positions + self.first_token, np.iinfo(np.int64).max),
        )

    def _token_ids(self, positions_MK: Int64Array) -> Int64Array:
        out = np.zeros(positions_MK.shape, np.int64)
        low = 0
        for shard in self.rows.shards:
            here = (positions_MK >= low) & (positions_MK < low + len(shard.token_ids))
            out[here] = shard.token_ids[positions_MK[here] - low]
            low += len(shard.token_ids)
        return out
