"""The ensemble stage: further scorers of every training query's candidates, for the teacher's score."""

from __future__ import annotations

from typing import Any

from ckd_ray.data import Collection
from ckd_ray.distill.objectives import scorers_of
from ckd_ray.ensemble.stage import SCORERS, EnsembleJob, score_ensemble
from ckd_ray.files import join, read_json
from ckd_ray.pipeline.baselines import ENCODER_EMBEDDINGS, LeftOutError, embed_encoder
from ckd_ray.progress import say
from ckd_ray.runs.directory import RunContext


def score_with_ensemble(context: RunContext) -> dict[str, Any]:
    """Fill `ensemble/`: a folder of scores for each scorer, and `weights.json`. A scorer that cannot be had is left
    out, and a line says why."""
    config = context.config
    scorers = set(scorers_of(config.distill))
    if "encoder" in scorers:
        try:
            embed_encoder(context, ["train"])
        except LeftOutError as reason:
            say(f"ensemble: the encoder is left out: {reason}")
            scorers.remove("encoder")
    job = EnsembleJob(
        run=context.run,
        out=context.path("ensemble"),
        rankings=context.path("rankings"),
        scorers=tuple(name for name in SCORERS if name in scorers),
        vectors=context.path(ENCODER_EMBEDDINGS),
        positive_grade=config.collection.positive_grade,
        depth=config.distill.negatives_depth,
        similarity=read_json(join(context.path("teacher"), "colbert.json"))["similarity"],
    )
    count = Collection.open(context.run).num_queries("train")
    weights = score_ensemble(job, count)
    shown = ", ".join(f"{name} {weight.fitted:.3g}" for name, weight in weights.items())
    say(f"ensemble: weights fitted to the labels, in MaxSim a unit of score: {shown or 'none'}")
    return {"count": count, "unit": "queries", "weights": {name: weight.fitted for name, weight in weights.items()}}
