"""The label stage: feedback passages and collective expansion of every training query (docs/method.md, step 4).

Runs on Ray Data, a file of labels a batch of queries; the mathematics is in `expand.py` and knows nothing of Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from ckd_ray.collective.expand import expand
from ckd_ray.collective.labels import part_name, write_labels
from ckd_ray.config import LabelConfig
from ckd_ray.progress import Progress
from ckd_ray.retrieve.rankings import part_file, part_matrix, read_ranking_part
from ckd_ray.retrieve.servers import ServerGroup
from ckd_ray.retrieve.stream import collection_once, open_once, query_spans, run_parts
from ckd_ray.store.files import join, list_files, local_copy, make_folder


@dataclass(frozen=True)
class LabelJob:
    """Label the queries of `split` from the rankings in `rankings` and the teacher's `passages`, into `out`."""

    run: str
    split: str
    checkpoint: str
    passages: str
    rankings: str
    out: str
    settings: LabelConfig


def label(job: LabelJob, servers: ServerGroup | None, num_queries: int) -> int:
    """Write the missing parts. Returns the queries a part, for the manifest.

    Args:
        servers: answer for the nearest tokens of the collection; None when the feedback's own tokens vote.
    """
    make_folder(job.out)
    spans = query_spans(num_queries)
    present = set(list_files(job.out, ".parquet"))
    missing = [i for i in range(len(spans)) if part_name(job.split, i) + ".parquet" not in present]
    done = num_queries - sum(spans[i][1] - spans[i][0] for i in missing)
    with Progress("label", num_queries, "queries", done=done) as progress:
        for row in run_parts(missing, spans, _label_part, {"job": job, "servers": servers}):
            progress.advance(int(row["queries"]))
    return spans[0][1] - spans[0][0] if spans else 1


@lru_cache(maxsize=2)
def _silent_ids(checkpoint: str) -> Any:
    from ckd_ray.model.colbert import load_tokenizer

    with local_copy(checkpoint) as folder:
        return load_tokenizer(folder).silent_ids


def _label_part(batch: dict[str, Any], job: LabelJob, servers: ServerGroup | None) -> pa.Table:
    part, first, stop = (int(batch[name][0]) for name in ("part", "first", "stop"))
    store, collection, settings = open_once(job.passages), collection_once(job.run), job.settings
    table = read_ranking_part(join(job.rankings, part_file(job.split, part)))
    top = part_matrix(table, first, stop - first, settings.feedback_passages).astype(np.int64)
    chosen = store.gather(top[top >= 0])
    counts = (top >= 0).sum(axis=1)
    embeddings = _nest(chosen.split(), counts)
    tokens = _nest(np.split(chosen.token_ids, np.cumsum(chosen.lengths)[:-1]), counts)

    def neighbours(centroids_MD: Any) -> Any:
        assert servers is not None
        return servers.nearest_tokens(centroids_MD.numpy(), settings.voters)

    expansions = expand(
        [[passage.float() for passage in query] for query in embeddings],
        neighbours=neighbours,
        document_frequencies=store.document_frequencies,
        num_passages=store.num_passages,
        special_ids=_silent_ids(job.checkpoint),
        clusters=settings.clusters,
        voters=settings.voters,
        tokens=tokens,
        token_vote=settings.token_vote,
    )
    write_labels(
        job.out,
        job.split,
        part,
        query_ids=collection.queries(job.split).ids[first:stop],
        feedback_ids=_nest(collection.passage_ids(top[top >= 0]), counts),
        expansions=expansions,
        clusters=settings.clusters,
    )
    return pa.table({"part": [part], "queries": [stop - first]})


def _nest(flat: Any, counts: Any) -> list[Any]:
    """Cut a flat list into one list a query."""
    bounds = np.concatenate([[0], np.cumsum(counts)]).tolist()
    flat = list(flat)
    return [flat[low:high] for low, high in pairwise(bounds)]
