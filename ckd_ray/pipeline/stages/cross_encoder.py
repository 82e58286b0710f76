"""The cross-encoder stage: scores of (query, candidate) pairs, from a file or by a classifier."""

from __future__ import annotations

from functools import partial
from typing import Any

from ckd_ray.config import Config
from ckd_ray.errors import UserError
from ckd_ray.files import file_signature, join, write_json_atomic
from ckd_ray.model.sources import signature
from ckd_ray.pipeline.stage import Stage
from ckd_ray.runs.artifact import MANIFEST
from ckd_ray.runs.directory import RunContext

# In the folder of the scores.
_PRECISION = "_plan.json"


def scored_depth(config: Config) -> int:
    """Hard negatives a query that are scored."""
    depth = config.cross_encoder.depth
    return config.distill.negatives_depth if depth == "auto" else depth


def fingerprint_settings(config: Config) -> dict[str, Any]:
    """The file of scores, or the classifier and how it is run."""
    c = config.cross_encoder
    if c.scores is not None:
        return {"scores": c.scores, "file": file_signature(c.scores)}
    settings = {**c.for_fingerprint({"scores"}), "depth": scored_depth(config)}
    files = signature(c.model) if c.model else []
    return {**settings, "files": files, "positive_grade": config.collection.positive_grade}


def run(context: RunContext, fingerprint: str) -> dict[str, Any]:
    """Write the scores."""
    from ckd_ray.cross_encoder.candidates import CandidateReader
    from ckd_ray.cross_encoder.score_file import import_scores
    from ckd_ray.cross_encoder.stream import CrossEncoderJob, score_candidates
    from ckd_ray.pipeline.precision import agreed_precision, precision_on_cluster

    config, run, out = context.config, context.paths.root, context.paths.cross_scores
    c, depth, grade = config.cross_encoder, scored_depth(config), config.collection.positive_grade
    candidates = CandidateReader(run, grade, depth)
    if c.scores is not None:
        queries_per_part, coverage = import_scores(c.scores, out, candidates, run)
        figures: dict[str, Any] = coverage.figures()
    elif c.model is not None:
        choose = partial(precision_on_cluster, None, c.precision, c.gpus_per_actor, "cross_encoder.precision")
        precision = agreed_precision(out, "cross_encoder", choose, _PRECISION)
        job = CrossEncoderJob(run, out, c.model, grade, depth, c.maxlen, c.token_budget, precision)
        queries_per_part, pairs = score_candidates(job, c, candidates.num_queries)
        figures = {"pairs": pairs, "precision": precision}
    else:
        raise UserError(
            "nothing to take scores from",
            where="cross_encoder",
            expected="cross_encoder.scores (a file) or cross_encoder.model (a classifier)",
        )
    write_json_atomic(join(out, MANIFEST), {"queries_per_part": queries_per_part, "split": "train"})
    return {"count": candidates.num_queries, "unit": "queries", **figures}


STAGE = Stage(
    name="cross_encoder",
    inputs=lambda config: ("retrieve",),
    output=lambda run: run.cross_scores,
    fingerprint_settings=fingerprint_settings,
    run=run,
)
