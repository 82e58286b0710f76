"""Labels on disk: Parquet for people and other programs, and beside it arrays that training reads at random.

A part holds the labels of consecutive queries of a split: `train-000012.parquet` (columns query_id, feedback_ids,
expansion, idf, token_ids) and `train-000012.npy`, float32 (queries, K, D + 1): the K centroids of highest idf first,
their idf in the last column, zero rows where a query has fewer.

Where `label.feedback_passages` lists M depths, the manifest says them, and the array is (queries, M K, D + 1): M such
blocks after one another, the shallowest depth first. The lists of a Parquet row then hold the centroids of all depths
in this order. Their depths are one more column, `depths`, which labels of one depth do not have. feedback_ids are those
of the deepest. Shapes: B queries, K centroids, E kept expansion embeddings, D dimensions.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ckd_ray.collective.expand import Expansions
from ckd_ray.errors import JobError
from ckd_ray.files import filesystem_of, is_local, join, read_json, write_atomic
from ckd_ray.ray_util.parts import part_name

Int64Array = npt.NDArray[np.int64]

_OPEN_PARTS = 64
_REMOTE_READERS = 16


def write_labels(
    folder: str,
    split: str,
    part: int,
    *,
    query_ids: Sequence[str],
    feedback_ids: Sequence[Sequence[str]],
    expansions: Expansions | Mapping[int, Expansions],
    clusters: int,
) -> None:
    """Write one part; the Parquet file comes last and is what says that the part is there.

    Args:
        expansions: those of one depth, or of each depth, which ascend.
        clusters: K.
    """
    by_depth = {0: expansions} if isinstance(expansions, Expansions) else dict(expansions)
    blocks = [_block(found, clusters) for found in by_depth.values()]
    table_BKX, token_ids_BK, present_BK = (np.concatenate(arrays, axis=1) for arrays in zip(*blocks, strict=True))
    dim = table_BKX.shape[2] - 1
    name = part_name(split, part)
    buffer = io.BytesIO()
    np.save(buffer, table_BKX, allow_pickle=False)
    write_atomic(join(folder, f"{name}.npy"), lambda stream: stream.write(buffer.getbuffer()))
    vectors = pa.array(table_BKX[:, :, :dim][present_BK].reshape(-1), pa.float32())
    columns = {
        "query_id": pa.array(query_ids, pa.string()),
        "feedback_ids": pa.array([list(ids) for ids in feedback_ids], pa.list_(pa.string())),
        "expansion": _lists(pa.FixedSizeListArray.from_arrays(vectors, dim), present_BK),
        "idf": _lists(pa.array(table_BKX[:, :, dim][present_BK], pa.float32()), present_BK),
        "token_ids": _lists(pa.array(token_ids_BK[present_BK], pa.int32()), present_BK),
    }
    if len(by_depth) > 1:
        depths_BK = np.broadcast_to(np.repeat(list(by_depth), clusters), present_BK.shape)
        columns["depths"] = _lists(pa.array(depths_BK[present_BK], pa.int32()), present_BK)
    rows = pa.table(columns)
    write_atomic(join(folder, f"{name}.parquet"), lambda stream: pq.write_table(rows, stream, compression="zstd"))


def _block(
    expansions: Expansions, clusters: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """The centroids of one depth with their idf, their token ids, and which of the K are there."""
    num_queries, found, dim = expansions.embeddings_BKD.shape
    kept = min(clusters, found)
    table_BKX = np.zeros((num_queries, clusters, dim + 1), np.float32)
    table_BKX[:, :kept, :dim] = expansions.embeddings_BKD[:, :kept].cpu().numpy()
    table_BKX[:, :kept, dim] = expansions.idf_BK[:, :kept].cpu().numpy()
    token_ids_BK = np.zeros((num_queries, clusters), np.int32)
    token_ids_BK[:, :kept] = expansions.token_ids_BK[:, :kept].cpu().numpy()
    present_BK = np.arange(clusters)[None] < expansions.counts_B.cpu().numpy()[:, None]
    return table_BKX, token_ids_BK, present_BK


def manifest_of_labels(queries_per_part: int, split: str, depths: Sequence[int]) -> dict[str, Any]:
    """What the manifest says of labels from these depths, for `ExpansionReader.open`."""
    several = {"feedback_passages": list(depths)} if len(depths) > 1 else {}
    return {"queries_per_part": queries_per_part, "split": split, **several}


def _lists(values: pa.Array, present_BK: npt.NDArray[np.bool_]) -> pa.Array:
    """One list a query out of the flat values of all queries."""
    offsets = np.concatenate([[0], np.cumsum(present_BK.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


class ExpansionReader:
    """Random access to the expansions of a split, by dense query index; nothing is opened before it is asked for.

    Only the rows asked for are read, also from an object store, and at most `_OPEN_PARTS` files are open: memory and
    file handles do not grow with the number of queries.

    Args:
        depths: the depths of feedback when there are several, each of which has a block of centroids; else empty.

    Attributes:
        blocks: M, how many blocks a query has: the `depths` of `expansion_weights`.
    """

    def __init__(self, folder: str, split: str, queries_per_part: int, depths: Sequence[int] = ()) -> None:
        self.folder, self.split, self.queries_per_part = folder, split, queries_per_part
        self.depths, self.blocks = tuple(depths), max(1, len(depths))
        self._open: OrderedDict[int, _Part] = OrderedDict()
        # Requests to an object store wait for the network, so they go out together.
        self._readers = None if is_local(folder) else ThreadPoolExecutor(_REMOTE_READERS, "labels")

    @classmethod
    def open(cls, folder: str, split: str) -> ExpansionReader:
        """Open the labels of a finished label stage."""
        manifest: dict[str, Any] = read_json(join(folder, "manifest.json"))
        return cls(folder, split, manifest["queries_per_part"], manifest.get("feedback_passages", ()))

    def _part(self, part: int) -> _Part:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        self._open[part] = _Part(join(self.folder, part_name(self.split, part) + ".npy"))
        if len(self._open) > _OPEN_PARTS:
            # Not closed here: a request that still runs holds the file until it is done.
            self._open.popitem(last=False)
        return self._open[part]

    def select(self, queries_B: Int64Array, size: int, beta: float = 1.0) -> tuple[Tensor, Tensor]:
        """The `size` centroids of highest idf of each depth: (expansions_BED, weights_BE = beta * idf); absent ones
        weigh 0. `expansion_weights` makes other weights of those at beta = 1.

        E = M * min(size, K), the depths one after another. Raises JobError when a file is shorter than its header says.
        """
        asked = [divmod(q, self.queries_per_part) for q in queries_B.tolist()]
        jobs = [(self._part(part), row, size, self.blocks) for part, row in asked]
        rows = [_read(job) for job in jobs] if self._readers is None else list(self._readers.map(_read, jobs))
        if not rows:
            return torch.zeros(0, self.blocks * size, 0), torch.zeros(0, self.blocks * size)
        table_BEX = torch.from_numpy(np.stack(rows))
        return table_BEX[:, :, :-1].contiguous(), beta * table_BEX[:, :, -1]


class _Part:
    """An open .npy file of shape (queries, K, D + 1), float32; M K instead of K for M depths."""

    def __init__(self, uri: str) -> None:
        fs, path = filesystem_of(uri)
        self.uri, self.file = uri, fs.open_input_file(path)
        version = np.lib.format.read_magic(self.file)
        assert version == (1, 0), f"{uri}: written by another version of numpy"
        self.shape, _, dtype = np.lib.format.read_array_header_1_0(self.file)
        assert dtype == np.float32 and len(self.shape) == 3, f"{uri}: not a part of labels"
        self.start = self.file.tell()


def _read(job: tuple[_Part, int, int, int]) -> npt.NDArray[np.float32]:
    """The first `size` centroids of each block of a row, (E, D + 1)."""
    part, row, size, blocks = job
    queries, centroids, width = part.shape
    if not 0 <= row < queries:
        raise IndexError(f"query {row} of {part.uri}, which has {queries}")
    assert centroids % blocks == 0, f"{part.uri}: {centroids} centroids are not {blocks} blocks of equal size"
    clusters = centroids // blocks
    kept = min(size, clusters)
    # One request, up to what is wanted of the last block.
    rows = (blocks - 1) * clusters + kept
    wanted = rows * width * 4
    data = part.file.read_at(wanted, part.start + row * centroids * width * 4)
    if len(data) != wanted:
        raise JobError(f"{part.uri}: shorter than its header says; run the label stage again")
    found = np.frombuffer(data, np.float32).reshape(rows, width)
    return np.concatenate([found[first : first + kept] for first in range(0, rows, clusters)])
