"""The ensemble stage: scores of every training query's candidates by further scorers, for the teacher's score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckd_ray.config import Config
from ckd_ray.distill.objectives import scorers_of
from ckd_ray.files import join, read_json
from ckd_ray.model.sources import identity
from ckd_ray.pipeline.stage import Stage
from ckd_ray.progress import say
from ckd_ray.runs.directory import RunContext

if TYPE_CHECKING:
    from ckd_ray.arrays import Int64Array
    from ckd_ray.data import Collection


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
    """Write a folder of scores for each scorer, and `weights.json`. A scorer that cannot be had is left out, and a line
    says why."""
    from ckd_ray.data import Collection
    from ckd_ray.ensemble.stage import EnsembleJob, score_ensemble
    from ckd_ray.pipeline.baselines import LeftOutError, embed_encoder

    config, paths = context.config, context.paths
    scorers = list(scorers_of(config.distill))
    if "encoder" in scorers:
        try:
            embed_encoder(context, ["train"])
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
    collection = Collection.open(paths.root)
    count = collection.num_queries("train")
    weights = score_ensemble(job, count, _seen(config, collection))
    shown = ", ".join(f"{name} {weight.fitted:.3g}" for name, weight in weights.items())
    say(f"ensemble: weights fitted to the labels, in MaxSim a unit of score: {shown or 'none'}")
    return {"count": count, "unit": "queries", "weights": {name: weight.fitted for name, weight in weights.items()}}


def _seen(config: Config, collection: Collection) -> Int64Array:
    """The training queries that the teacher was trained on, as far as that is known: none of a given checkpoint's."""
    import numpy as np

    from ckd_ray.distill.batches import BatchPlan

    teacher = config.teacher
    if teacher.checkpoint is not None:
        return np.empty(0, np.int64)
    plan = BatchPlan(
        collection.positives("train", config.collection.positive_grade),
        num_passages=collection.num_passages,
        batch_size=teacher.batch_size,
        negatives=teacher.negatives,
        seed=config.run.seed,
    )
    return plan.queries_before(teacher.steps)


STAGE = Stage(
    name="ensemble",
    inputs=lambda config: ("retrieve",),
    output=lambda run: run.ensemble,
    fingerprint_settings=fingerprint_settings,
    run=run,
)
