"""The cross_encoder stage: Ray Data streams (query, candidate) pairs through tokenising tasks into a pool of models.

The unit of work is a part: some consecutive queries with all their candidates. The driver sees part numbers and a few
figures only. A finished part is never computed again, whichever process died.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ckd_ray.config import CrossEncoderConfig
from ckd_ray.cross_encoder.candidates import CandidateReader
from ckd_ray.cross_encoder.classifier import PairClassifier, Pairs, PairTokenizer, absolute_folder
from ckd_ray.cross_encoder.scores import write_scores
from ckd_ray.data.collection import collection_once
from ckd_ray.files import exists, join, make_folder
from ckd_ray.model.encoder import Precision
from ckd_ray.progress import Progress
from ckd_ray.ray_util.actor_pool import place_pool
from ckd_ray.ray_util.parts import array_file, part_file, part_name, parts_present, query_spans
from ckd_ray.ray_util.processes import actor_device
from ckd_ray.ray_util.through_pool import through_pool


@dataclass(frozen=True)
class CrossEncoderJob:
    """The scoring of the training queries' candidates of `run` into `out`; the same in every process."""

    run: str
    out: str
    model: str
    positive_grade: float
    depth: int
    maxlen: int
    token_budget: int
    precision: Precision


def score_candidates(job: CrossEncoderJob, settings: CrossEncoderConfig, num_queries: int) -> tuple[int, int]:
    """Write the missing parts.

    Returns:
        The number of queries a part, for the manifest, and of pairs scored by this call.

    Raises:
        UserError: the model is not a cross-encoder, or the pool of actors does not fit the cluster.
    """
    make_folder(job.out)
    size = queries_a_part(num_queries)
    spans = query_spans(num_queries, size)
    present = parts_present(job.out)
    missing = [i for i in range(len(spans)) if part_file("train", i) not in present]
    done = num_queries - sum(spans[i][1] - spans[i][0] for i in missing)
    pairs = 0
    with Progress("cross_encoder", num_queries, "queries", done=done) as progress:
        if missing:
            # Loaded here first: errors keep their type here, and actors would report them only after the first pairs.
            job = replace(job, model=absolute_folder(job.model))
            PairTokenizer(job.model, job.maxlen)
            PairClassifier(job.model)
            pool = place_pool(settings.actors, settings.gpus_per_actor, limit=len(missing), key="cross_encoder")
            work = [{"part": i, "first": spans[i][0], "stop": spans[i][1]} for i in missing]
            rows = through_pool(
                work,
                pool,
                prepare=_tokenise,
                prepare_arguments={"job": job},
                actor=PartScorer,
                actor_arguments={"job": job, "threads": pool.threads},
                smaller="If a part takes that long, lower cross_encoder.depth",
            )
            for row in rows:
                pairs += row["pairs"]
                progress.advance(row["queries"])
    return size, pairs


def queries_a_part(num_queries: int) -> int:
    """A power of two from 8 to 256 that gives about 256 parts: a pair costs a pass of a transformer."""
    size = 8
    while size < 256 and size * 256 < num_queries:
        size *= 2
    return size


@lru_cache(maxsize=2)
def _tokenizer_and_candidates(job: CrossEncoderJob) -> tuple[PairTokenizer, CandidateReader]:
    """Loaded once in each worker process; without weights."""
    reader = CandidateReader(job.run, job.positive_grade, job.depth)
    return PairTokenizer(job.model, job.maxlen), reader


def _tokenise(batch: dict[str, Any], job: CrossEncoderJob) -> pa.Table:
    """The pairs of one part as one row: candidates and token ids, flat, with their counts."""
    part, first, stop = (int(batch[name][0]) for name in ("part", "first", "stop"))
    tokenizer, reader = _tokenizer_and_candidates(job)
    queries = collection_once(job.run).queries_between("train", first, stop).texts
    wanted = reader.read(first, stop).all()
    counts = np.array([len(passages) for passages in wanted], np.int32)
    flat = np.concatenate([*wanted, np.empty(0, np.int64)]).astype(np.int64)
    unique, where = np.unique(flat, return_inverse=True)  # queries share candidates: each text is read once
    texts = collection_once(job.run).texts(unique)
    asked = np.repeat(np.arange(stop - first), counts)
    pairs = tokenizer([queries[i] for i in asked.tolist()], [texts[i] for i in where.tolist()])
    lists: dict[str, npt.NDArray[Any]] = {
        "counts": counts,
        "passages": flat,
        "lengths": pairs.lengths,
        "token_ids": pairs.token_ids,
        "token_types": pairs.token_types,
    }
    columns = {
        name: pa.array([values], pa.large_list(pa.from_numpy_dtype(values.dtype))) for name, values in lists.items()
    }
    return pa.table({"part": [part], "first": [first], **columns})


class PartScorer:
    """An actor that scores pairs and writes each part. It returns figures, never scores."""

    def __init__(self, job: CrossEncoderJob, threads: int) -> None:
        import torch

        torch.set_num_threads(max(1, min(threads, os.cpu_count() or 1)))
        self.job = job
        self.model = PairClassifier(
            job.model, device=actor_device(), token_budget=job.token_budget, precision=job.precision
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._score(table.slice(i, 1)) for i in range(table.num_rows)])

    def _score(self, row: pa.Table) -> dict[str, int]:
        job, part, first = self.job, row["part"][0].as_py(), row["first"][0].as_py()
        counts, passages, lengths, ids, types = (
            row[name][0].values.to_numpy() for name in ("counts", "passages", "lengths", "token_ids", "token_types")
        )
        figures = {"part": part, "queries": len(counts), "pairs": len(passages)}
        name = part_name("train", part)
        if exists(array_file(job.out, name)) and exists(join(job.out, f"{name}.parquet")):
            return figures  # an earlier actor died after it had written the part
        scores = self.model.score(Pairs(ids, types, lengths))
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise FloatingPointError(
                f"the cross-encoder's score is {scores[bad[0]]} for a pair of part {part}; set cross_encoder.precision:"
                " fp32, or use another model"
            )
        cuts = np.cumsum(counts)[:-1]
        collection = collection_once(job.run)
        write_scores(
            job.out,
            "train",
            part,
            query_ids=collection.queries_between("train", first, first + len(counts)).ids,
            passages=np.split(passages, cuts),
            scores=np.split(scores, cuts),
            passage_ids=collection.passage_ids(passages),
        )
        return figures
