"""The ensemble stage: scores of every training query's candidates by further scorers, for the teacher's score."""

from __future__ import annotations

from typing import Any

from ckd_ray.config import Config
from ckd_ray.distill.objectives import scorers_of
from ckd_ray.files import join, read_json
from ckd_ray.model.sources import identity
from ckd_ray.pipeline.stage import Stage
from ckd_ray.progress import say
from ckd_ray.runs.directory import RunContext


def fingerprint_settings(config: Config) -> dict[str, Any]:
    """The scorers, the candidates, and what the encoder as it is depends on."""
    scorers = scorers_of(config.distill)
    backbone = identity(config.model.backbone)
    return {
        "scorers": list(scorers),
        "depth": config.distill.negatives_depth,
        "positive_grade": config.collection.positive_grade,
        **({"backbone": backbone, "precision": config.embed.precision} if "encoder" in scorers else {}),
    }


def run(context: RunContext, fingerprint: str) -> dict[str, Any]:
    """Write a folder of scores for each scorer, and `weights.json`. An unavailable scorer is left out, and a line says
    why."""
    from ckd_ray.data import Collection
    from ckd_ray.ensemble.stage import EnsembleJob, score_ensemble
    from ckd_ray.pipeline.baselines import LeftOutError, embed_encoder
    from ckd_ray.pipeline.evaluation import evaluation_splits

    config, paths = context.config, context.paths
    collection = Collection.open(paths.root)
    scorers = list(scorers_of(config.distill))
    if "encoder" in scorers:
        try:
            # Also the splits of the evaluation, so that it need not load the encoder again.
            measured = evaluation_splits(config, collection) if "encoder" in config.evaluate.baselines else []
            embed_encoder(context, list(dict.fromkeys(["train", *measured])))
        except LeftOutError as reason:
            say(f"ensemble: the encoder is left out: {reason}")
            scorers.remove("encoder")
    job = EnsembleJob(
        run=paths.root,
        out=paths.ensemble,
        rankings=paths.rankings,
        scorers=tuple(scorers),
        vectors=paths.encoder_embeddings,
        positive_grade=config.collection.positive_grade,
        depth=config.distill.negatives_depth,
        similarity=read_json(join(paths.teacher, "colbert.json"))["similarity"],
    )
    count = collection.num_queries("train")
    weights = score_ensemble(job, count)
    shown = ", ".join(f"{name} {weight.fitted:.3g}" for name, weight in weights.items())
    say(f"ensemble: weights fitted to the labels (MaxSim per unit of a score): {shown or 'none'}")
    return {"count": count, "unit": "queries", "weights": {name: weight.fitted for name, weight in weights.items()}}


STAGE = Stage(
    name="ensemble",
    inputs=lambda config: ("retrieve",),
    output=lambda run: run.ensemble,
    fingerprint_settings=fingerprint_settings,
    run=run,
)
