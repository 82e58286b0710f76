"""Cells of the embedding space that hold only special tokens: they show how the collection votes, without a search.

The 10 nearest of all token embeddings vote for a centroid's token, and special tokens among them do not count
(method.md, step 4). Without a search over the collection, the query's own feedback votes. But three passages hold
three [CLS] each, so they cannot show that the collection would vote for [CLS] alone, which drops the centroid. The
cells can show it: k-means clusters a bounded sample of the store, and a cell is special if it holds hardly anything
else than special tokens.
On MedQuAD this elects the token of the exact neighbours for 79 % of the centroids; IVF-PQ, as published, does so for
76 %, the feedback alone for 73 %.

Neither the memory nor the time of an answer grows with the collection. Shapes: S sampled rows, D dimensions, K cells,
M vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ckd_ray.arrays import BoolArray, Int64Array, IntArray
from ckd_ray.files import filesystem_of, write_atomic
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.spherical import spherical_kmeans

# Token embeddings that the cells are learned from: an eighth of a GiB in fp16, whatever the collection.
SAMPLE = 500_000
_MEMBERS_A_CELL = 64
_TRAINING_POINTS_A_CELL = 32
_MOST_CELLS = 1 << 12
_ITERATIONS = 4
# From this share of special members on, ten voters drawn in proportion to the members are all special.
_SPECIAL_SHARE = 10 / 11
_SPAN = 32
_BLOCK = 1 << 22  # numbers of a block of similarities
# Cosines of a float32 product have a smaller error than this. Closer ones are compared again in float64.
_CLOSE = 1e-5
_EVERY = 16  # one in so many of the other cells is compared first


@dataclass(frozen=True)
class SpecialCells:
    """Cells of the embedding space, those of special tokens apart.

    Attributes:
        special_XD: float32 unit rows, the special cells; other_YD: the rest; X + Y = K.
    """

    special_XD: Tensor
    other_YD: Tensor

    @classmethod
    def of_store(cls, store: EmbeddingStore, special_token_ids: IntArray, *, seed: int) -> SpecialCells:
        """Learn the cells from about `SAMPLE` token embeddings of the store.

        The sample depends on the passages and the seed, not on the shards.
        """
        read = store.gather(sample_passages(store.num_passages, store.num_tokens, SAMPLE, seed))
        return cls.learn(read.embeddings_TD, np.isin(read.token_ids, special_token_ids), seed=seed)

    @classmethod
    def learn(cls, rows_SD: Tensor, special_S: BoolArray, *, seed: int, cells: int | None = None) -> SpecialCells:
        """Learn the cells by spherical k-means. A cell is special when more than 10 of 11 of its rows are.

        Args:
            rows_SD: unit rows, any float type.
            special_S: true where the row belongs to a token that does not vote.
            cells: K; `choose_cells` when None.
        """
        if not len(rows_SD):
            return cls(torch.zeros(0, rows_SD.shape[1]), torch.zeros(0, rows_SD.shape[1]))
        count = min(cells or choose_cells(len(rows_SD)), len(rows_SD))
        cells_KD = spherical_kmeans(
            rows_SD, count, iterations=_ITERATIONS, points_a_centroid=_TRAINING_POINTS_A_CELL, seed=seed
        )
        step = max(1, _BLOCK // count)
        cell_S = torch.cat([(rows.float() @ cells_KD.T).argmax(1) for rows in rows_SD.split(step)]).numpy()
        members_K = np.bincount(cell_S, minlength=count)
        special_K = torch.from_numpy(np.bincount(cell_S[special_S], minlength=count) > _SPECIAL_SHARE * members_K)
        return cls(cells_KD[special_K], cells_KD[~special_K])

    def save(self, uri: str) -> None:
        """Write the cells as one safetensors file, atomically."""
        from safetensors.torch import save

        data = save({"special": self.special_XD.contiguous(), "other": self.other_YD.contiguous()})
        write_atomic(uri, lambda stream: stream.write(data))

    @classmethod
    def load(cls, uri: str) -> SpecialCells:
        """Read what `save` wrote."""
        from safetensors.torch import load

        fs, path = filesystem_of(uri)
        with fs.open_input_stream(path) as stream:
            tensors = load(stream.read())
        return cls(tensors["special"], tensors["other"])

    def in_special_cell(self, vectors_MD: Tensor) -> BoolArray:
        """(M,) true where the nearest cell is special. The other vectors of the call do not change an answer."""
        out = np.zeros(len(vectors_MD), bool)
        if not len(self.special_XD) or not len(self.other_YD):
            return out | bool(len(self.special_XD))
        step = max(1, _BLOCK // (len(self.special_XD) + len(self.other_YD)))
        for start in range(0, len(vectors_MD), step):
            unit = torch.nn.functional.normalize(vectors_MD[start : start + step].float().cpu(), dim=1)
            # Most vectors are nearer to one of a few other cells than to any special cell: those few come first.
            few = torch.from_numpy(np.arange(0, len(self.other_YD), _EVERY))
            doubtful = (self._lead(unit, self.other_YD[few]) > -_CLOSE).nonzero()[:, 0]
            lead = self._lead(unit[doubtful], self.other_YD)
            # The rounding of a matrix product depends on its other rows: near ties are settled one by one.
            for row in (lead.abs() < _CLOSE).nonzero()[:, 0].tolist():
                lead[row] = self._exact_lead(unit[doubtful[row]])
            out[start + doubtful[lead > 0].numpy()] = True
        return out

    def _lead(self, unit_MD: Tensor, other_YD: Tensor) -> Tensor:
        """The cosine with the nearest special cell minus that with the nearest of `other_YD`."""
        return (unit_MD @ self.special_XD.T).amax(1) - (unit_MD @ other_YD.T).amax(1)

    def _exact_lead(self, unit_D: Tensor) -> float:
        special, other = ((cells.double() * unit_D.double()).sum(1).max() for cells in (self.special_XD, self.other_YD))
        return float(special - other)


def choose_cells(rows: int) -> int:
    """The power of two below rows / 64, from 1 to 4,096."""
    return int(2 ** int(np.log2(max(1.0, min(rows / _MEMBERS_A_CELL, _MOST_CELLS)))))


def sample_passages(num_passages: int, num_tokens: int, sample: int, seed: int) -> Int64Array:
    """Passages with about `sample` tokens together, ascending, in spans of 32 so that reading is mostly sequential."""
    if num_tokens <= sample:
        return np.arange(num_passages)
    starts = np.arange(0, num_passages, _SPAN)
    count = max(1, int(len(starts) * sample / num_tokens))
    chosen = np.sort(np.random.default_rng(seed).choice(starts, count, replace=False))
    found = (chosen[:, None] + np.arange(_SPAN)).ravel()
    return found[found < num_passages]
