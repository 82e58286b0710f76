"""The first pass of a search: compare settings of the labels without training.

Labels are as good as the teacher's ranking. So the teacher ranks dev with every combination of settings: its score with
that expansion (method.md, step 5) reranks the top of its plain ranking, and MRR@10 measures the result. The engine
of the retrieve stage finds the candidates in the whole collection. Shapes: B queries, N = depth candidates, E expansion
embeddings, Q and L rows, D dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ckd_ray.collective.scores import expansion_weights, teacher_scores
from ckd_ray.data import Collection
from ckd_ray.data.collection import collection_once
from ckd_ray.distill.dev import mean_reciprocal_rank
from ckd_ray.errors import UserError
from ckd_ray.files import join, read_json
from ckd_ray.labels.files import ExpansionReader
from ckd_ray.model.maxsim import counted_rows
from ckd_ray.pipeline.labelling import label_split
from ckd_ray.pipeline.search_engine import search_settings
from ckd_ray.progress import Progress
from ckd_ray.ray_util.parts import query_spans, run_parts
from ckd_ray.retrieve.rankings import read_ranking_matrix
from ckd_ray.retrieve.servers import serving
from ckd_ray.retrieve.stream import RetrieveJob, retrieve
from ckd_ray.runs.artifact import fingerprint_of, make, seconds_of
from ckd_ray.runs.directory import RunContext, RunDir, labels_name
from ckd_ray.runs.fingerprint import fingerprint
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.embeddings import open_once
from ckd_ray.tune.space import Values, with_values

_SPLIT = "dev"


def first_pass(context: RunContext, folder: str, combinations: Sequence[Values]) -> tuple[list[float], float]:
    """(the teacher's MRR@10 on dev with each combination, the seconds of the whole pass).

    Resumable: the contents of `folder` from an earlier call stay, and their seconds count.

    Raises:
        UserError: no dev query has a labelled passage.
    """
    rankings = _rank_dev(context, join(folder, "rankings"))
    changed = [with_values(context.config, values) for values in combinations]
    labels = [join(folder, labels_name(config.label.model_dump(mode="json"))) for config in changed]
    for config, out in {out: (config, out) for config, out in zip(changed, labels, strict=True)}.values():
        _label_dev(RunContext(config, context.paths), rankings, out)
    ways = [
        {
            "labels": out,
            "beta": config.distill.beta,
            "share": config.distill.expansion_share,
            "size": config.distill.expansion_size,
            "floor": config.distill.zero_row_floor,
        }
        for config, out in zip(changed, labels, strict=True)
    ]
    seconds = sum(seconds_of(made) for made in (rankings, *set(labels)))
    started = time.monotonic()
    count = Collection.open(context.paths.root).num_queries(_SPLIT)
    spans = query_spans(count, 64)
    arguments: dict[str, Any] = {
        "run": context.paths.root,
        "checkpoint": context.paths.teacher,
        "rankings": rankings,
        "ways": ways,
        "positive_grade": context.config.collection.positive_grade,
    }
    sums, queries = np.zeros(len(ways)), 0
    with Progress("tune: first pass", count, "queries") as progress:
        for row in run_parts(list(range(len(spans))), spans, _judge_part, arguments):
            sums += np.asarray(row["sums"])
            queries += int(row["judged"])
            progress.advance(int(row["queries"]))
    if not queries:
        raise UserError("no dev query has a labelled passage", where="tune", expected="labels for the dev split")
    return [float(total) / queries for total in sums], round(seconds + time.monotonic() - started, 3)


def _rank_dev(context: RunContext, out: str) -> str:
    config = context.config.retrieve
    queries = context.paths.query_embeddings(_SPLIT)
    store = EmbeddingStore.open(context.paths.passages)
    count = Collection.open(context.paths.root).num_queries(_SPLIT)

    def work() -> dict[str, Any]:
        job = RetrieveJob(run=context.paths.root, split=_SPLIT, queries=queries, out=out, depth=config.depth)
        rows = count * context.config.model.query_maxlen
        with serving(store, search_settings(context.config, store, count), config.actors, rows) as servers:
            retrieve(job, servers, count, stage="tune: dev rankings")
        return {}

    embeddings = fingerprint_of(context.paths.embeddings)
    make(out, fingerprint(dev=embeddings, retrieve=config.model_dump(mode="json", exclude={"actors"})), _timed(work))
    return out


def _label_dev(context: RunContext, rankings: str, out: str) -> None:
    def work() -> dict[str, Any]:
        return label_split(context, _SPLIT, rankings, out)

    ranked = fingerprint_of(rankings)
    settings = context.config.label.model_dump(mode="json")
    make(out, fingerprint(label=settings, rankings=ranked, seed=context.config.run.seed), _timed(work))


def _timed(work: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """`work` with its duration in the result."""

    def timed() -> dict[str, Any]:
        started = time.monotonic()
        return {**work(), "seconds": round(time.monotonic() - started, 3)}

    return timed


def _judge_part(
    batch: dict[str, Any], run: str, checkpoint: str, rankings: str, ways: list[dict[str, Any]], positive_grade: float
) -> pa.Table:
    """Reciprocal ranks of some dev queries, summed over the queries, for each combination in `ways`."""
    first, stop = (int(batch[name][0]) for name in ("first", "stop"))
    paths = RunDir(run)
    queries, passages = open_once(paths.query_embeddings(_SPLIT)), open_once(paths.passages)
    similarity = read_json(join(checkpoint, "colbert.json"))["similarity"]
    positives = collection_once(run).positives(_SPLIT, positive_grade)
    top_BN = np.asarray(read_ranking_matrix(rankings, _SPLIT)[first:stop])
    rows_BQD = queries.gather(np.arange(first, stop)).embeddings_TD.reshape(stop - first, -1, queries.dim).float()
    readers = {way["labels"]: ExpansionReader.open(way["labels"], _SPLIT) for way in ways}
    sums, judged = np.zeros(len(ways)), 0
    for row, query in enumerate(range(first, stop)):
        wanted, candidates_N = positives.of(query), top_BN[row][top_BN[row] >= 0]
        if not len(wanted):
            continue
        judged += 1
        if not len(candidates_N):
            continue
        rows_NLD, mask_NL = passages.gather(candidates_N.astype(np.int64)).padded()
        relevant_1N = np.isin(candidates_N, wanted)[None]
        for i, way in enumerate(ways):
            reader = readers[way["labels"]]
            expansions, idf = reader.select(np.array([query]), way["size"])
            rows_1 = counted_rows(rows_BQD[row : row + 1])
            weights = expansion_weights(idf, rows_1, beta=way["beta"], share=way["share"], depths=reader.blocks)
            scores_1N = teacher_scores(
                rows_BQD[row : row + 1], expansions, weights, rows_NLD.float(), mask_NL, similarity,
                zero_row_floor=way["floor"],
            )  # fmt: skip
            sums[i] += mean_reciprocal_rank(scores_1N.numpy(), relevant_1N)
    sums_list = pa.array([sums.tolist()], pa.list_(pa.float64()))
    return pa.table({"queries": [stop - first], "judged": [judged], "sums": sums_list})
