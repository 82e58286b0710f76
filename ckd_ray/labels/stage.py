"""The label stage: feedback passages and collective expansion of every training query (method.md, step 4).

Ray Data runs a task for each part (a batch of queries), which writes one file of labels. The mathematics is in
`feedback.py` and `ckd_ray/collective/expand.py`, without Ray.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor

from ckd_ray.arrays import BoolArray, Int64Array
from ckd_ray.collective.special_cells import SAMPLE, SpecialCells
from ckd_ray.config import LabelConfig
from ckd_ray.data.collection import collection_once
from ckd_ray.files import exists, file_signature, join, make_folder
from ckd_ray.labels.feedback import expand_depths, nest
from ckd_ray.labels.files import write_labels
from ckd_ray.progress import say
from ckd_ray.ray_util.parts import finish_parts, part_file, parts_present
from ckd_ray.ray_util.waiting import answer
from ckd_ray.retrieve.rankings import part_matrix, read_ranking_part
from ckd_ray.retrieve.servers import Searcher
from ckd_ray.store.embeddings import open_once

# The special cells, in the folder of the labels that they helped to make.
CELLS = "_special_cells.safetensors"


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


@dataclass(frozen=True)
class ServerVotes:
    """The nearest token embeddings of the whole store vote. The servers that hold its shards find them."""

    servers: Searcher
    voters: int

    def __call__(self, vectors_MD: Tensor) -> Int64Array:
        return self.servers.nearest_tokens(vectors_MD.numpy(), self.voters)


@dataclass(frozen=True)
class EstimatedVotes:
    """The feedback's own tokens vote. The cells at `uri` tell which centroids lie among special tokens."""

    uri: str

    def in_special_cell(self, vectors_MD: Tensor) -> BoolArray:
        """See `SpecialCells.in_special_cell`."""
        return _cells_once(self.uri, *file_signature(self.uri)).in_special_cell(vectors_MD)


Votes = ServerVotes | EstimatedVotes | None


def label(job: LabelJob, votes: Votes, num_queries: int) -> int:
    """Write the missing parts. Returns the number of queries a part, for the manifest.

    Args:
        votes: who elects the centroids' tokens; None: the feedback's own tokens.
    """
    make_folder(job.out)
    arguments = {"job": job, "votes": votes}
    # k-means takes a core. Beside the servers of a store there may be no whole one; then one task a core runs.
    cpus = votes.servers.cpus if isinstance(votes, ServerVotes) else 1.0
    spans = finish_parts("label", job.split, num_queries, parts_present(job.out), _label_part, arguments, cpus)
    return spans[0][1] - spans[0][0] if spans else 1


def find_special_cells(uri: str, job: LabelJob, seed: int) -> str:
    """Learn the special cells in a task, so that the driver stays small, unless `uri` exists. Returns `uri`."""
    if not exists(uri):
        say(f"  finding the cells of special tokens in a sample of up to {SAMPLE:,} token embeddings")
        answer("the cells of special tokens", ray.remote(num_cpus=1)(_find_special_cells).remote(uri, job, seed))
    return uri


def _find_special_cells(uri: str, job: LabelJob, seed: int) -> None:
    torch.set_num_threads(os.cpu_count() or 1)  # no other task runs at this time
    SpecialCells.of_store(open_once(job.passages), _special_token_ids(job.checkpoint), seed=seed).save(uri)


@lru_cache(maxsize=2)
def _cells_once(uri: str, size: int, changed: int) -> SpecialCells:
    return SpecialCells.load(uri)


@lru_cache(maxsize=2)
def _special_token_ids(checkpoint: str) -> Any:
    from ckd_ray.model.colbert import load_tokenizer
    from ckd_ray.model.sources import local_tokenizer

    with local_tokenizer(checkpoint) as folder:
        return load_tokenizer(folder).special_token_ids


def _label_part(batch: dict[str, Any], job: LabelJob, votes: Votes) -> pa.Table:
    part, first, stop = (int(batch[name][0]) for name in ("part", "first", "stop"))
    label_part(job, votes, part, first, stop)
    return pa.table({"part": [part], "queries": [stop - first]})


def label_part(job: LabelJob, votes: Votes, part: int, first: int, stop: int) -> None:
    """Label the queries [first, stop) of ranking part `part`, and write the part's files."""
    table = read_ranking_part(join(job.rankings, part_file(job.split, part)))
    feedback_BF = part_matrix(table, first, stop - first, job.settings.depths[-1]).astype(np.int64)
    expansions = expand_depths(
        open_once(job.passages),
        feedback_BF,
        job.settings,
        neighbours=votes if isinstance(votes, ServerVotes) else None,
        special_token_ids=_special_token_ids(job.checkpoint),
        in_special_cell=votes.in_special_cell if isinstance(votes, EstimatedVotes) else None,
    )
    present_BF = feedback_BF >= 0
    write_labels(
        job.out,
        job.split,
        part,
        query_ids=collection_once(job.run).queries_between(job.split, first, stop).ids,
        feedback_ids=nest(collection_once(job.run).passage_ids(feedback_BF[present_BF]), present_BF.sum(axis=1)),
        expansions=expansions,
        clusters=job.settings.clusters,
    )
