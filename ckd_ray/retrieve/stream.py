"""The retrieve stage: Ray Data streams query batches to the shard servers; each finished batch is a file of
rankings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ckd_ray.arrays import Float32Array, Int64Array
from ckd_ray.data.collection import collection_once
from ckd_ray.files import join, list_files, make_folder
from ckd_ray.ray_util.parts import finish_parts, part_file
from ckd_ray.retrieve.query_blocks import rows_until_last
from ckd_ray.retrieve.rankings import read_ranking_matrix, write_ranking_matrix, write_ranking_part
from ckd_ray.retrieve.servers import Searcher, ServerGroup
from ckd_ray.store.embeddings import open_once

_RECALL_OPERATIONS = 6e11
MOST_EFFORT = 64


@dataclass(frozen=True)
class RetrieveJob:
    """Rank the queries of `split`, embedded in the store `queries`, into the folder `out`."""

    run: str
    split: str
    queries: str
    out: str
    depth: int


def retrieve(job: RetrieveJob, servers: Searcher, num_queries: int, *, stage: str = "retrieve") -> None:
    """Write the missing parts of `job`, then the matrix of all parts."""
    make_folder(job.out)
    present = set(list_files(job.out, ".parquet"))
    arguments = {"job": job, "servers": servers}
    spans = finish_parts(stage, job.split, num_queries, present, _retrieve_part, arguments, servers.cpus)
    write_ranking_matrix(job.out, job.split, spans, job.depth)


class RecallSample:
    """A sample of the queries with their exact rankings, to measure approximate search by.

    Recall@k is the share of the exact top k that the found top k holds; k is 100, or the depth below that. The sample
    is what 6e11 multiplications and additions allow (a few seconds of a core), 8 to 256 queries.

    Args:
        num_queries: of the split, 1 or more.
        operations: of an exact search for one query.
    """

    def __init__(
        self, job: RetrieveJob, servers: ServerGroup, num_queries: int, *, operations: float, seed: int
    ) -> None:
        self.job, self.servers, self.depth = job, servers, min(100, job.depth)
        self.size = min(num_queries, int(np.clip(_RECALL_OPERATIONS / max(1.0, operations), 8, 256)))
        self.sample = np.sort(np.random.default_rng(seed).choice(num_queries, self.size, replace=False))
        self._queries = _queries(job, self.sample)
        _, self._truth_BK = servers.search_exactly(self._queries, self.depth)

    def effort_for(self, wanted: float) -> tuple[int, float]:
        """(effort, recall): the least effort of 1, 2, 4, ..., `MOST_EFFORT` that reaches the wanted recall. If none
        does, the least effort with the highest recall."""
        best = (1, -1.0)
        effort = 1
        while effort <= MOST_EFFORT:
            _, found_BK = replace(self.servers, effort=effort).search(self._queries, self.depth)
            recall = self._recall(found_BK)
            if recall > best[1]:
                best = (effort, recall)
            if recall >= wanted:
                break
            effort *= 2
        return best

    def written(self) -> dict[str, Any]:
        """The recall of the rankings that were written."""
        found_BK = np.asarray(read_ranking_matrix(self.job.out, self.job.split)[self.sample, : self.depth])
        return {f"recall_at_{self.depth}": round(self._recall(found_BK), 4), "recall_queries": self.size}

    def _recall(self, found_BK: npt.NDArray[np.integer]) -> float:
        hits = [len(np.intersect1d(t[t >= 0], f)) for t, f in zip(self._truth_BK, found_BK, strict=True)]
        return sum(hits) / max(1, int((self._truth_BK >= 0).sum()))


def _queries(job: RetrieveJob, queries_B: Int64Array) -> Float32Array:
    """Rows (B, Q, D), where Q is the longest of these queries: behind a query's text, rows may be zero."""
    store = open_once(job.queries)
    rows_BQD = store.gather(queries_B).embeddings_TD.float().reshape(len(queries_B), -1, store.dim)
    return rows_BQD[:, : max(1, int(rows_until_last(rows_BQD).max()))].numpy()


def _retrieve_part(batch: dict[str, Any], job: RetrieveJob, servers: Searcher) -> pa.Table:
    part, first, stop = (int(batch[name][0]) for name in ("part", "first", "stop"))
    collection = collection_once(job.run)
    scores_BK, passages_BK = servers.search(_queries(job, np.arange(first, stop)), job.depth)
    write_ranking_part(
        join(job.out, part_file(job.split, part)),
        first_query=first,
        query_ids=collection.queries_between(job.split, first, stop).ids,
        scores_BK=scores_BK,
        passages_BK=passages_BK,
        passage_ids=collection.passage_ids(passages_BK[passages_BK >= 0]),
    )
    return pa.table({"part": [part], "queries": [stop - first]})
