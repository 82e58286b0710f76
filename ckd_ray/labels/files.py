"""Labels on disk (`array_parts`): a Parquet file with columns query_id, feedback_ids, expansion, idf and token_ids,
and an array, float32 (queries, K, D + 1).

The array holds the K centroids of highest idf, highest first, with their idf in the last column, and zero rows where a
query has fewer.

Where `label.feedback_passages` lists M depths, the manifest lists them, and the array is (queries, M K, D + 1): M such
blocks, the shallowest depth first. The lists of a Parquet row then hold the centroids of all depths in this order. One
more column, `depths`, gives the depth of each; feedback_ids are those of the deepest. Shapes: B queries, K centroids,
E kept expansion embeddings, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ckd_ray.arrays import BoolArray, Float32Array, Int32Array, Int64Array
from ckd_ray.collective.expand import Expansions
from ckd_ray.files import read_json
from ckd_ray.labels.array_parts import ArrayParts, write_part
from ckd_ray.runs.artifact import manifest_file


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
    """Write one part.

    Args:
        expansions: those of a single depth, or by depth in ascending order.
        clusters: K.
    """
    by_depth = {0: expansions} if isinstance(expansions, Expansions) else dict(expansions)
    blocks = [_block(found, clusters) for found in by_depth.values()]
    table_BKX, token_ids_BK, present_BK = (np.concatenate(arrays, axis=1) for arrays in zip(*blocks, strict=True))
    dim = table_BKX.shape[2] - 1
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
    write_part(folder, split, part, table_BKX, pa.table(columns))


def _block(expansions: Expansions, clusters: int) -> tuple[Float32Array, Int32Array, BoolArray]:
    """The centroids of one depth with their idf, their token ids, and which of the K exist."""
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
    """The entries of the manifest that `ExpansionReader.open` reads."""
    several = {"feedback_passages": list(depths)} if len(depths) > 1 else {}
    return {"queries_per_part": queries_per_part, "split": split, **several}


def _lists(values: pa.Array, present_BK: BoolArray) -> pa.Array:
    """The flat values of all queries as one list a query."""
    offsets = np.concatenate([[0], np.cumsum(present_BK.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


class ExpansionReader:
    """Random access to the expansions of a split, by dense query index (`ArrayParts`).

    Args:
        depths: the depths of feedback when there are several, each of which has a block of centroids; else empty.

    Attributes:
        blocks: M, the number of blocks of a query: the `depths` of `expansion_weights`.
    """

    def __init__(self, folder: str, split: str, queries_per_part: int, depths: Sequence[int] = ()) -> None:
        self.queries_per_part, self.depths, self.blocks = queries_per_part, tuple(depths), max(1, len(depths))
        self._parts = ArrayParts(folder, split, queries_per_part, "label")

    @classmethod
    def open(cls, folder: str, split: str) -> ExpansionReader:
        """Open the labels of a finished label stage."""
        manifest: dict[str, Any] = read_json(manifest_file(folder))
        return cls(folder, split, manifest["queries_per_part"], manifest.get("feedback_passages", ()))

    def select(self, queries_B: Int64Array, size: int, beta: float = 1.0) -> tuple[Tensor, Tensor]:
        """The `size` centroids of highest idf of each depth: (expansions_BED, weights_BE = beta * idf); missing ones
        weigh 0. `expansion_weights` computes other weights from those at beta = 1.

        E = M * min(size, K), the depths one after another. Raises JobError when a file is shorter than its header says.
        """
        rows = self._parts.read(queries_B, size, self.blocks)
        if not rows:
            return torch.zeros(0, self.blocks * size, 0), torch.zeros(0, self.blocks * size)
        table_BEX = torch.from_numpy(np.stack(rows))
        return table_BEX[:, :, :-1].contiguous(), beta * table_BEX[:, :, -1]
