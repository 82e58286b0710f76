"""The ensemble stage: scores of every training query's candidates by further scorers, for the teacher's score."""

from __future__ import annotations

from dataclasses import replace
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
    from ckd_ray.ensemble.stage import EnsembleJob


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
    from ckd_ray.ensemble.bm25 import collection_statistics
    from ckd_ray.ensemble.stage import EnsembleJob, score_candidates, write_weights
    from ckd_ray.pipeline.baselines import LeftOutError, embed_encoder

    config, paths = context.config, context.paths
    collection = Collection.open(paths.root)
    fitted = fitted_queries(context, collection)
    scorers = list(scorers_of(config.distill))
    if "encoder" in scorers:
        try:
            embed_encoder(context, sorted({"train", *fitted, *_measured(config, collection)}))
        except LeftOutError as reason:
            say(f"ensemble: the encoder is left out: {reason}")
            scorers.remove("encoder")
    job = EnsembleJob(
        run=paths.root,
        split="train",
        out=paths.ensemble,
        rankings=paths.rankings,
        scorers=tuple(scorers),
        vectors=paths.encoder_embeddings,
        positive_grade=config.collection.positive_grade,
        depth=config.distill.negatives_depth,
        similarity=read_json(join(paths.teacher, "colbert.json"))["similarity"],
    )
    statistics = collection_statistics(job.run, job.out) if "bm25" in scorers else None
    count = collection.num_queries("train")
    score_candidates(job, count, statistics)
    ((split, queries),) = fitted.items()
    if split != "train":
        fit = join(paths.ensemble, "fit")
        job = replace(job, split=split, out=fit, rankings=join(fit, "rankings"))
        first = int(queries[-1]) + 1
        _rank(context, job, first)
        score_candidates(job, first, statistics)
    weights = write_weights(job, queries, paths.ensemble)
    shown = ", ".join(f"{name} {weight.fitted:.3g}" for name, weight in weights.items())
    say(f"ensemble: weights fitted to labels of {split}, in MaxSim a unit of score: {shown or 'none'}")
    return {"count": count, "unit": "queries", "weights": {name: weight.fitted for name, weight in weights.items()}}


def fitted_queries(context: RunContext, collection: Collection) -> dict[str, Int64Array]:
    """{split: labelled queries} that the weights are fitted to: dev's; else those of train that are new to the teacher.

    A teacher is surer of the queries and passages that it was trained on than of new ones, and there the other scorers
    would weigh too little (docs/explanation/evidence.md).
    """
    import numpy as np

    from ckd_ray.distill.batches import BatchPlan
    from ckd_ray.ensemble.stage import FEWEST_TO_FIT, MOST_TO_FIT

    config, teacher = context.config, context.config.teacher
    grade = config.collection.positive_grade
    if "dev" in collection.splits:
        labelled = collection.positives("dev", grade).labelled_queries
        first = labelled[labelled < MOST_TO_FIT]
        if len(first) >= FEWEST_TO_FIT:
            return {"dev": first}
    positives = collection.positives("train", grade)
    labelled = positives.labelled_queries
    if teacher.checkpoint is None and len(labelled):
        plan = BatchPlan(
            positives,
            num_passages=collection.num_passages,
            batch_size=teacher.batch_size,
            negatives=teacher.negatives,
            seed=config.run.seed,
        )
        new = np.setdiff1d(labelled, plan.queries_before(teacher.steps))
        labelled = new if len(new) >= FEWEST_TO_FIT else labelled
    return {"train": labelled}


def _measured(config: Config, collection: Collection) -> list[str]:
    """The splits on which the encoder as it is will be measured: embedding them now saves starting it again."""
    from ckd_ray.pipeline.evaluation import evaluation_splits

    return evaluation_splits(config, collection) if "encoder" in config.evaluate.baselines else []


def _rank(context: RunContext, job: EnsembleJob, num_queries: int) -> None:
    """The teacher's rankings of the queries that the weights are fitted to."""
    from ckd_ray.pipeline.search_engine import search_settings
    from ckd_ray.retrieve.servers import serving
    from ckd_ray.retrieve.stream import RetrieveJob, retrieve
    from ckd_ray.store import EmbeddingStore

    retriever = context.config.retrieve
    store = EmbeddingStore.open(context.paths.passages)
    depth = min(retriever.depth, max(1, store.num_passages))
    ranking = RetrieveJob(job.run, job.split, context.paths.query_embeddings(job.split), job.rankings, depth)
    with serving(store, search_settings(context.config, store, num_queries), retriever.actors) as servers:
        retrieve(ranking, servers, num_queries, stage=f"ensemble teacher {job.split}")


STAGE = Stage(
    name="ensemble",
    inputs=lambda config: ("retrieve",),
    output=lambda run: run.ensemble,
    fingerprint_settings=fingerprint_settings,
    run=run,
)
