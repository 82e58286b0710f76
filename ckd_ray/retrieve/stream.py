"""The retrieve stage: Ray Data streams query batches to the shard servers; each finished batch is a file of
rankings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ckd_ray.arrays import Float32Array, Int64Array
from ckd_ray.data.collection import collection_once
from ckd_ray.files import join, list_files, make_folder
from ckd_ray.ray_util.parts import finish_parts, part_file
from ckd_ray.retrieve.query_blocks import rows_until_last
from ckd_ray.retrieve.rankings import read_ranking_matrix, write_ranking_matrix, write_ranking_part
from ckd_ray.retrieve.servers import ServerGroup
from ckd_ray.store.embeddings import open_once

_RECALL_OPERATIONS = 6e11


@dataclass(frozen=True)
class RetrieveJob:
    """Rank the queries of `split`, embedded in the store `queries`, into the folder `out`."""

    run: str
    split: str
    queries: str
    out: str
    depth: int


def retrieve(job: RetrieveJob, servers: ServerGroup, num_queries: int, *, stage: str = "retrieve") -> None:
    """Write the missing parts of `job`, then the matrix of all parts."""
    make_folder(job.out)
    present = set(list_files(job.out, ".parquet"))
    arguments = {"job": job, "servers": servers}
    spans = finish_parts(stage, job.split, num_queries, present, _retrieve_part, arguments)
    write_ranking_matrix(job.out, job.split, spans, job.depth)


def measured_recall(
    job: RetrieveJob, servers: ServerGroup, num_queries: int, *, operations: float, seed: int
) -> dict[str, Any]:
    """Recall of the written rankings against exact search, over a sample of the queries.

    Recall@k is the share of the exact top k that the ranking's top k holds; k is 100, or the depth below that. The
    sample is what 6e11 multiplications and additions allow (a few seconds of a core), 8 to 256 queries.

    Args:
        operations: of an exact search for one query.
    """
    if not num_queries:
        return {}
    size = min(num_queries, int(np.clip(_RECALL_OPERATIONS / max(1.0, operations), 8, 256)))
    sample = np.sort(np.random.default_rng(seed).choice(num_queries, size, replace=False))
    depth = min(100, job.depth)
    _, truth_BK = servers.search_exactly(_queries(job, sample), depth)
    found_BK = np.asarray(read_ranking_matrix(job.out, job.split)[sample, :depth])
    hits = [len(np.intersect1d(t[t >= 0], f)) for t, f in zip(truth_BK, found_BK, strict=True)]
    recall = sum(hits) / max(1, int((truth_BK >= 0).sum()))
    return {f"recall_at_{depth}": round(recall, 4), "recall_queries": size}


def _queries(job: RetrieveJob, queries_B: Int64Array) -> Float32Array:
    """Rows (B, Q, D), where Q is the longest of these queries: behind a query's text, rows may be zero."""
    store = open_once(job.queries)
    rows_BQD = store.gather(queries_B).embeddings_TD.float().reshape(len(queries_B), -1, store.dim)
    return rows_BQD[:, : max(1, int(rows_until_last(rows_BQD).max()))].numpy()


def _retrieve_part(batch: dict[str, Any], job: RetrieveJob, servers: ServerGroup) -> pa.Table:
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
