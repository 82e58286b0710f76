"""Which tokens stand around a point of the embedding space: token counts of its cells.

With it a centroid's voters (docs/method.md, step 4) need no search over all token embeddings: the query's own feedback
votes, and the cells around the centroid tell whether special tokens crowd it, in which case the collection would leave
no vote. On MedQuAD that elects the exact neighbours' token for 79 % of the centroids, IVF-PQ does for 76 %, the
feedback alone for 73 %, the counts of the cells alone for 50 %. The cells and the counts come from a bounded sample of
the store, read once before labelling: neither memory nor the time of an answer grows with the collection.

Shapes: S sampled rows, D dimensions, K cells, T tokens kept a cell, M vectors, V voters, C cells asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ckd_ray.store import EmbeddingStore
from ckd_ray.store.files import filesystem_of, write_atomic

Int64Array = npt.NDArray[np.int64]

# Token embeddings that the table is made of: a quarter of a GiB in fp16, whatever the collection.
SAMPLE = 1_000_000
_MEMBERS_A_CELL = 128
_TRAINING_POINTS_A_CELL = 32
_MOST_CELLS = 1 << 13
_ITERATIONS = 4
_TOKENS_A_CELL = 32
_CELLS_ASKED = 4
# How fast a cell's say falls with its distance: exp(-_SHARPNESS * (cosine of the nearest cell - its own)).
_SHARPNESS = 20.0
_SPAN = 32
_BLOCK = 1 << 24  # numbers of a block of similarities


@dataclass(frozen=True)
class TokenTable:
    """Cells and the tokens in them.

    Attributes:
        cells_KD: float32 unit rows.
        token_ids_KT: int64, the most frequent tokens of each cell, -1 behind the last.
        counts_KT: float32, how often each occurs in the sample.
    """

    cells_KD: Tensor
    token_ids_KT: Tensor
    counts_KT: Tensor

    @classmethod
    def of_store(cls, store: EmbeddingStore, *, seed: int, sample: int = SAMPLE) -> TokenTable:
        """Learn the cells from at most `sample` token embeddings of the store and count the tokens in them.

        The sample follows from the passages and the seed, not from the shards.
        """
        read = store.gather(sample_passages(store.num_passages, store.num_tokens, sample, seed))
        return cls.learn(read.embeddings_TD, read.token_ids, seed=seed)

    @classmethod
    def learn(
        cls, rows_SD: Tensor, token_ids_S: npt.NDArray[np.integer], *, seed: int, cells: int | None = None
    ) -> TokenTable:
        """Cells by spherical k-means over the rows, then the tokens of each cell's rows.

        Args:
            rows_SD: unit rows, any float type.
            cells: K; `choose_cells` when None.
        """
        import faiss

        count = min(cells or choose_cells(len(rows_SD)), max(1, len(rows_SD)))
        if not len(rows_SD):
            return cls(torch.zeros(1, rows_SD.shape[1]), torch.full((1, 1), -1), torch.zeros(1, 1))
        faiss.omp_set_num_threads(torch.get_num_threads())
        kmeans = faiss.Kmeans(
            rows_SD.shape[1],
            count,
            niter=_ITERATIONS,
            seed=seed,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=_TRAINING_POINTS_A_CELL,
        )
        kmeans.train(rows_SD.float().numpy())
        cells_KD = torch.from_numpy(np.array(kmeans.centroids, np.float32).reshape(count, -1))
        step = max(1, _BLOCK // count)
        cell_S = torch.cat([(rows.float() @ cells_KD.T).argmax(1) for rows in rows_SD.split(step)]).numpy()
        return cls(cells_KD, *_count(cell_S, np.asarray(token_ids_S, np.int64), count))

    def save(self, uri: str) -> None:
        """Write the table as one safetensors file, atomically."""
        from safetensors.torch import save

        data = save({name: value.contiguous() for name, value in vars(self).items()})
        write_atomic(uri, lambda stream: stream.write(data))

    @classmethod
    def load(cls, uri: str) -> TokenTable:
        """Read what `save` wrote."""
        from safetensors.torch import load

        fs, path = filesystem_of(uri)
        with fs.open_input_stream(path) as stream:
            return cls(**load(stream.read()))

    def votes(self, vectors_MD: Tensor, voters: int) -> Int64Array:
        """Token ids (M, V), most frequent first: `voters` seats, handed out in proportion to the tokens' counts in the
        cells around each vector (by d'Hondt's method). -1 where there are no tokens.

        A vector's answer does not depend on the others it is asked with.
        """
        step = max(1, _BLOCK // max(1, len(self.cells_KD)))
        parts = [self._votes(vectors, voters) for vectors in vectors_MD.float().split(step)]
        return torch.cat(parts).cpu().numpy() if parts else np.empty((0, voters), np.int64)

    def crowded(self, vectors_MD: Tensor, voters: int, silent_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """(M,) true where all seats go to `silent_ids`, so that nobody would be left to vote."""
        votes = self.votes(vectors_MD, voters)
        return (np.isin(votes, silent_ids) | (votes < 0)).all(axis=1)

    def _votes(self, vectors_MD: Tensor, voters: int) -> Tensor:
        similarity_MC, cell_MC = self._around(torch.nn.functional.normalize(vectors_MD, dim=1))
        say_MC = torch.exp(_SHARPNESS * (similarity_MC - similarity_MC[:, :1]))
        counts_MCT = self.counts_KT[cell_MC] * say_MC[:, :, None]
        token_ids_MX, counts_MX = _merge(self.token_ids_KT[cell_MC].flatten(1), counts_MCT.flatten(1))
        return seats(token_ids_MX, counts_MX, voters)

    def _around(self, unit_MD: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines, cells) (M, C) of the nearest cells, nearest first. A matrix product rounds a row differently in
        other company, so a few cells more are taken and compared once more in float64, each by itself."""
        asked = min(_CELLS_ASKED, len(self.cells_KD))
        near_MX = (unit_MD @ self.cells_KD.T).topk(min(asked + 4, len(self.cells_KD)), dim=1).indices.sort(1).values
        cosine_MX = (self.cells_KD[near_MX].double() * unit_MD.double()[:, None]).sum(2)
        cosine_MX, order_MX = cosine_MX.sort(dim=1, descending=True, stable=True)
        return cosine_MX[:, :asked].float(), near_MX.gather(1, order_MX)[:, :asked]


def choose_cells(rows: int) -> int:
    """The power of two below rows / 128, from 1 to 8,192."""
    return int(2 ** int(np.log2(max(1.0, min(rows / _MEMBERS_A_CELL, _MOST_CELLS)))))


def sample_passages(num_passages: int, num_tokens: int, sample: int, seed: int) -> Int64Array:
    """Passages with about `sample` tokens together, ascending; spans of 32 are drawn, so that reading is in runs."""
    if num_tokens <= sample:
        return np.arange(num_passages)
    starts = np.arange(0, num_passages, _SPAN)
    count = max(1, int(len(starts) * sample / num_tokens))
    chosen = np.sort(np.random.default_rng(seed).choice(starts, count, replace=False))
    found = (chosen[:, None] + np.arange(_SPAN)).ravel()
    return found[found < num_passages]


def seats(token_ids_MX: Tensor, counts_MX: Tensor, voters: int) -> Tensor:
    """Hand out `voters` seats by d'Hondt's method: (M, V) token ids, -1 where nothing is left to hand out.

    Token ids of a row are distinct; -1 holds no count. Equal quotients go to the smaller token id first.
    """
    kept = min(voters, counts_MX.shape[1])
    # The order by id first and then, stably, by count makes ties fall the same way everywhere.
    ids_MX, order_MX = token_ids_MX.sort(dim=1, stable=True)
    counts_MX, by_count_MX = counts_MX.gather(1, order_MX).sort(dim=1, descending=True, stable=True)
    ids_MX, counts_MX = ids_MX.gather(1, by_count_MX)[:, :kept], counts_MX[:, :kept]
    quotients = counts_MX[:, :, None] / torch.arange(1, voters + 1, device=counts_MX.device)
    value_MV, seat_MV = quotients.flatten(1).sort(dim=1, descending=True, stable=True)
    ids_MV = ids_MX.gather(1, seat_MV[:, :voters] // voters)
    return ids_MV.masked_fill(value_MV[:, :voters] <= 0, -1)


def _merge(token_ids_MX: Tensor, counts_MX: Tensor) -> tuple[Tensor, Tensor]:
    """The same token in several cells: its counts are added up; -1 and 0 take the places that this frees."""
    ids_MX, order_MX = token_ids_MX.sort(dim=1, stable=True)
    total_MX = counts_MX.gather(1, order_MX).double().cumsum(1)
    last_MX = torch.ones_like(ids_MX, dtype=torch.bool)
    last_MX[:, :-1] = ids_MX[:, 1:] != ids_MX[:, :-1]
    # Sums up to the end of each run of equal ids, minus the same of the run before.
    ends_MX = total_MX.masked_fill(~last_MX, 0.0).cummax(1).values
    before_MX = torch.nn.functional.pad(ends_MX[:, :-1], (1, 0))
    sums_MX = (total_MX - before_MX).float()
    kept_MX = last_MX & (ids_MX >= 0)
    return ids_MX.masked_fill(~kept_MX, -1), sums_MX.masked_fill(~kept_MX, 0.0)


def _count(cell_S: Int64Array, token_ids_S: Int64Array, cells: int) -> tuple[Tensor, Tensor]:
    """(token_ids_KT, counts_KT) of the most frequent tokens of each cell; equal counts by token id."""
    pairs, counts = np.unique(cell_S << 32 | token_ids_S, return_counts=True)
    cell, token = pairs >> 32, pairs & 0xFFFFFFFF
    order = np.lexsort((token, -counts, cell))
    cell, token, counts = cell[order], token[order], counts[order]
    place = np.arange(len(cell)) - np.searchsorted(cell, cell)
    kept = place < _TOKENS_A_CELL
    token_ids_KT = torch.full((cells, _TOKENS_A_CELL), -1)
    counts_KT = torch.zeros(cells, _TOKENS_A_CELL)
    token_ids_KT[cell[kept], place[kept]] = torch.from_numpy(token[kept])
    counts_KT[cell[kept], place[kept]] = torch.from_numpy(counts[kept].astype(np.float32))
    return token_ids_KT, counts_KT
