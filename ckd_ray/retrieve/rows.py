"""Where the rows of a range of passages come from: memory, or the mapped shards of a store.

Only the rows asked for are copied, so an actor's memory does not grow with its range: mapped pages belong to the
system's cache. Shapes: N passages of the range, T rows asked for, D dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ckd_ray.arrays import Int32Array, Int64Array, IntArray
from ckd_ray.store import Shard


class RangeRows(ABC):
    """Rows of consecutive passages.

    Attributes:
        first: dense index of the first passage.
        lengths: (N,) int64 rows of each passage; offsets: (N + 1,) where its rows begin in the range.
    """

    def __init__(self, lengths: IntArray, first: int) -> None:
        self.first, self.lengths = first, np.asarray(lengths, np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @abstractmethod
    def take(self, index_T: Int64Array) -> Tensor:
        """float16 rows (T, D) by their positions in the range."""

    @property
    def num_passages(self) -> int:
        """N."""
        return len(self.lengths)

    @property
    def num_rows(self) -> int:
        """Rows of all passages."""
        return int(self.offsets[-1])


class FlatRows(RangeRows):
    """Rows in memory: rows_TD (any float type), passage after passage."""

    def __init__(self, rows_TD: Tensor, lengths: IntArray, first: int = 0) -> None:
        super().__init__(lengths, first)
        self._rows_TD = rows_TD

    def take(self, index_T: Int64Array) -> Tensor:
        return self._rows_TD[torch.from_numpy(index_T).to(self._rows_TD.device)].half()


class ShardRows(RangeRows):
    """Rows of consecutive shards, read from their maps and decoded when they are asked for."""

    def __init__(self, shards: Sequence[Shard], dim: int) -> None:
        super().__init__(
            np.concatenate([np.empty(0, np.int32), *(s.lengths for s in shards)]), shards[0].first if shards else 0
        )
        self.shards, self._dim = list(shards), dim
        self._bounds = np.cumsum([0, *(len(s.codes) for s in shards)])

    def take(self, index_T: Int64Array) -> Tensor:
        if len(self.shards) == 1:
            return self._of(0, index_T)
        which = np.searchsorted(self._bounds, index_T, side="right") - 1
        out_TD = torch.empty(len(index_T), self._dim, dtype=torch.float16)
        for i in np.unique(which).tolist():
            at = np.flatnonzero(which == i)
            out_TD[torch.from_numpy(at)] = self._of(i, index_T[at] - self._bounds[i])
        return out_TD

    def _of(self, shard: int, index_T: Int64Array) -> Tensor:
        opened = self.shards[shard]
        # Consecutive rows are a slice.
        if len(index_T) and index_T[-1] - index_T[0] == len(index_T) - 1 and (np.diff(index_T) == 1).all():
            return opened.codec.decode(opened.codes[index_T[0] : index_T[-1] + 1])
        if opened.codec.name == "fp16":
            return opened.embeddings()[torch.from_numpy(index_T)]
        return opened.codec.decode(opened.codes[index_T])

    def centroid_ids(self) -> Iterator[Int32Array]:
        """Of a store with a residual codec: (rows,) the centroid of every row, shard after shard."""
        for shard in self.shards:
            yield shard.codec.centroid_ids(shard.codes)  # type: ignore[attr-defined]
