"""What each stage does, in terms of the other rooms. Each function has the name of its stage.

They take the run and the stage's fingerprint, fill the stage's folder, and return figures: `count` and `unit` for the
closing line, and whatever the stage found out on the way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from ckd_ray.config import Config
from ckd_ray.config.schema import TrainingConfig
from ckd_ray.cross_encoder.candidates import CandidateReader
from ckd_ray.cross_encoder.score_file import import_scores
from ckd_ray.cross_encoder.stream import CrossEncoderJob, agreed_precision, score_candidates
from ckd_ray.data import Collection, build_collection
from ckd_ray.distill.callbacks import load_callbacks
from ckd_ray.distill.targets import degenerate, targets_of
from ckd_ray.distill.task import TrainingTask, checkpoints_of
from ckd_ray.distill.trainer import TrainingOutcome, fit
from ckd_ray.embed.learn_codec import with_codec
from ckd_ray.embed.stream import EmbedJob, embed_texts, plan_shards
from ckd_ray.errors import UserError
from ckd_ray.files import (
    delete,
    exists,
    filesystem_of,
    is_local,
    join,
    list_files,
    local_copy,
    make_folder,
    new_folder,
    read_json,
    write_json_atomic,
)
from ckd_ray.labels.files import manifest_of_labels
from ckd_ray.labels.stage import (
    CELLS,
    EstimatedVotes,
    LabelJob,
    ServerVotes,
    find_special_cells,
    label as label_queries,
)
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.encoder import choose_precision
from ckd_ray.model.exchange import load_any
from ckd_ray.model.pooled import PooledModel
from ckd_ray.pipeline.stages import distill_seed, scored_depth
from ckd_ray.progress import Progress, say
from ckd_ray.retrieve.faiss_index import DIGEST
from ckd_ray.retrieve.servers import SearchSettings, serving
from ckd_ray.retrieve.shard_range import choose_engine
from ckd_ray.retrieve.stream import RetrieveJob, measured_recall, retrieve as retrieve_queries
from ckd_ray.runs.artifact import identity_of
from ckd_ray.runs.directory import RunContext
from ckd_ray.runs.fingerprint import fingerprint
from ckd_ray.store import EmbeddingStore


def collection(context: RunContext, made_of: str) -> dict[str, Any]:
    """Read the source into `corpus/` and `queries/`."""
    with Progress("collection", None, "passages") as progress:
        built = build_collection(
            context.config.collection, context.run, progress=lambda done, total: progress.reach(done, total)
        )
    return {"count": built.num_passages, "unit": "passages", **built.figures()}


def teacher(context: RunContext, made_of: str) -> dict[str, Any]:
    """Train the teacher contrastively with sampled negatives, or take the checkpoint that is given."""
    config = context.config
    out = context.path("teacher")
    if config.teacher.checkpoint is not None:
        with _local(config.teacher.checkpoint) as given:
            model = _load(given, config, given=True)
        with new_folder(out) as folder:
            model.save(folder)
        return {"given": config.teacher.checkpoint}
    start = context.path("checkpoints", f"start-{made_of[:16]}")
    model = _load(config.model.backbone, config)
    with new_folder(start) as folder:
        model.save(folder)
    task = _task(context, "teacher", made_of, start, model)
    outcome = _fit(task, out, config.teacher)
    delete(start)
    return _training_figures(task, outcome)


def embed(context: RunContext, made_of: str) -> dict[str, Any]:
    """Embed the corpus and all queries with the teacher."""
    checkpoint, out = context.path("teacher"), context.path("embeddings")
    store = embed_all(context, checkpoint, out, made_of, stage="embed", splits=Collection.open(context.run).splits)
    return {**_store_figures(store), "teacher": identity_of(checkpoint)}


def retrieve(context: RunContext, made_of: str) -> dict[str, Any]:
    """Rank the corpus for every training query."""
    config = context.config.retrieve
    store = EmbeddingStore.open(context.path("embeddings", "passages"))
    count = Collection.open(context.run).num_queries("train")
    settings = search_settings(context.config, store, count)
    say(f"retrieve: engine {settings.engine}")
    figures: dict[str, Any] = {"count": count, "unit": "queries", "engine": settings.engine, "depth": config.depth}
    job = RetrieveJob(
        run=context.run,
        split="train",
        queries=context.path("embeddings", "queries.train"),
        out=context.path("rankings"),
        depth=min(config.depth, max(1, store.num_passages)),
    )
    with serving(store, settings, config.actors) as servers:
        retrieve_queries(job, servers, count)
        if settings.engine != "exact":
            operations = 2.0 * context.config.model.query_maxlen * store.num_tokens * store.dim
            seed = context.config.run.seed
            figures |= measured_recall(job, servers, count, operations=operations, seed=seed)
            say(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in figures.items() if k.startswith("recall")))
    return figures


def label(context: RunContext, made_of: str) -> dict[str, Any]:
    """Write collective relevance labels for every training query."""
    job = LabelJob(
        run=context.run,
        split="train",
        checkpoint=context.path("teacher"),
        passages=context.path("embeddings", "passages"),
        rankings=context.path("rankings"),
        out=context.path("labels"),
        settings=context.config.label,
    )
    return write_labels_of(context, job)


def write_labels_of(context: RunContext, job: LabelJob) -> dict[str, Any]:
    """Label the queries of any split, by the votes that the training queries' number suggests."""
    config = context.config
    store = EmbeddingStore.open(job.passages)
    collection = Collection.open(context.run)
    count = collection.num_queries(job.split)
    way = vote_way(config, store, collection.num_queries("train"))
    say(f"label: votes by {way}")
    if way == "feedback":
        queries_per_part = label_queries(job, None, count)
    elif way == "estimate":
        cells = find_special_cells(join(job.out, CELLS), job, config.run.seed)
        queries_per_part = label_queries(job, EstimatedVotes(cells), count)
    else:
        r = config.retrieve
        index = _kept_index(config, store) if way == "faiss" else None
        settings = SearchSettings(way, r.cells, r.nprobe, r.candidates, config.run.seed, index)
        with serving(store, settings, r.actors) as servers:
            queries_per_part = label_queries(job, ServerVotes(servers, config.label.voters), count)
    manifest = manifest_of_labels(queries_per_part, job.split, job.settings.depths)
    write_json_atomic(join(job.out, "manifest.json"), manifest)
    return {"count": count, "unit": "queries", "votes": way}


def vote_way(config: Config, store: EmbeddingStore, num_queries: int) -> str:
    """Who votes for the tokens of so many queries' centroids: `feedback`, or of the collection its `exact` nearest
    neighbours, those that `faiss` finds, or their `estimate` (special_cells.py). `auto` is exact while that is
    affordable."""
    if config.label.token_vote == "feedback":
        return "feedback"
    if config.label.neighbours != "auto":
        return config.label.neighbours
    vectors = config.label.clusters * len(config.label.depths)
    engine = choose_engine(num_queries, vectors, store.num_tokens, store.dim)
    return "exact" if engine == "exact" else "estimate"


def ensemble(context: RunContext, made_of: str) -> dict[str, Any]:
    """Score every training query's candidates with the encoder as it is and with BM25."""
    from ckd_ray.pipeline.ensemble import score_with_ensemble

    return score_with_ensemble(context)


def cross_encoder(context: RunContext, made_of: str) -> dict[str, Any]:
    """Take the scores of (query, candidate) pairs from a file, or produce them with a classifier."""
    config = context.config
    c, out = config.cross_encoder, context.path("cross_scores")
    depth, grade = scored_depth(config), config.collection.positive_grade
    candidates = CandidateReader(context.run, grade, depth)
    if c.scores is not None:
        queries_per_part, coverage = import_scores(c.scores, out, candidates, context.run)
        figures: dict[str, Any] = coverage.figures()
    elif c.model is not None:
        job = CrossEncoderJob(
            context.run, out, c.model, grade, depth, c.maxlen, c.token_budget, agreed_precision(out, c.precision)[0]
        )
        queries_per_part, pairs = score_candidates(job, c, candidates.num_queries)
        figures = {"pairs": pairs, "precision": job.precision}
    else:
        raise UserError(
            "nothing to take scores from",
            where="cross_encoder",
            expected="cross_encoder.scores (a file) or cross_encoder.model (a classifier)",
        )
    write_json_atomic(join(out, "manifest.json"), {"queries_per_part": queries_per_part, "split": "train"})
    return {"count": candidates.num_queries, "unit": "queries", **figures}


def distill(context: RunContext, made_of: str) -> dict[str, Any]:
    """Distil the student, starting from the teacher's weights."""
    task = distill_task(context, made_of)
    outcome = _fit(task, context.path("student"), context.config.distill)
    return _training_figures(task, outcome)


def distill_task(context: RunContext, made_of: str, *, keep: str | None = None) -> TrainingTask:
    """The training that distils the student of this configuration.

    Args:
        keep: the folder that keeps the precision chosen; that of the training's checkpoints when None.
    """
    start = context.path("teacher")
    with local_copy(start) as folder:
        model = ColBERT.from_pretrained(folder)
    return _task(context, "distill", made_of, start, model, keep)


def evaluate(context: RunContext, made_of: str) -> dict[str, Any]:
    """Teacher against student on the evaluation splits, by exact search."""
    from ckd_ray.pipeline.evaluation import evaluate_run
    from ckd_ray.pipeline.export import write_student_card

    figures = evaluate_run(context, made_of)
    if context.variant is None:  # a card tells of the run's own student
        write_student_card(context.run)
    return figures


def embed_all(
    context: RunContext,
    checkpoint: str,
    out: str,
    made_of: str,
    *,
    stage: str,
    splits: list[str],
    pooled: bool = False,
    precision: str | None = None,
) -> EmbeddingStore:
    """Embed the corpus into `out`/passages and the queries of `splits` into `out`/queries.SPLIT.

    Args:
        pooled: the checkpoint is a `PooledModel`, which gives one row a text; rows are kept in fp16.
        precision: instead of `embed.precision`.
    """
    config = context.config.embed
    model_class: type[ColBERT] | type[PooledModel] = PooledModel if pooled else ColBERT

    def choose() -> tuple[Any, str]:
        with local_copy(checkpoint) as folder:
            return _precision(model_class.from_pretrained(folder), precision or config.precision)

    agreed, reason = _agreed_precision(out, choose)
    say(f"{stage}: {agreed} ({reason})")
    collection = Collection.open(context.run)
    sizes = {f"queries.{split}": collection.num_queries(split) for split in splits}
    jobs = []
    for texts, count in {"passages": collection.num_passages, **sizes}.items():
        job = EmbedJob(
            run=context.run,
            texts=texts,
            checkpoint=checkpoint,
            out=join(out, texts),
            fingerprint=f"{made_of}/{texts}",
            token_budget=config.token_budget,
            precision=agreed,
            max_bad=config.max_bad_passages,
            pooled=pooled,
        )
        if texts == "passages" and not pooled:
            # Queries stay in fp16: they are few, and read in every comparison.
            job = with_codec(replace(job, codec=config.codec), count, config, seed=context.config.run.seed, stage=stage)
        jobs.append((job, plan_shards(count, config.passages_per_shard)))
    return embed_texts(jobs, config, stage=stage)[0]


def search_settings(config: Config, store: EmbeddingStore, num_queries: int) -> SearchSettings:
    """The engine for so many queries over this store; `auto` decides by the work that exact search would be."""
    r = config.retrieve
    engine: str = r.engine
    if engine == "auto":
        codec = store.manifest["codec"]
        engine = choose_engine(num_queries, config.model.query_maxlen, store.num_tokens, store.dim, codec)
    index = _kept_index(config, store) if engine == "faiss" else None
    return SearchSettings(engine, r.cells, r.nprobe, r.candidates, config.run.seed, index)


def _kept_index(config: Config, store: EmbeddingStore) -> str | None:
    """Where a faiss index over this store is kept, so that label and a resumed run need not build it again.

    Local runs only: faiss maps a file. An index of other settings or embeddings that lies there is removed.
    """
    folder = join(RunContext.of(config).run, "index")
    if not is_local(folder):
        return None
    settings = {"cells": config.retrieve.cells, "seed": config.run.seed}
    made_of = fingerprint(shards=[s["sha256"] for s in store.manifest["shards"]], **settings)
    name = f"{made_of[:16]}.faiss"
    make_folder(folder)
    for other in list_files(folder, ""):
        if other not in (name, name + DIGEST):
            delete(join(folder, other))
    return filesystem_of(join(folder, name))[1]  # a path: faiss knows no file://


def _agreed_precision(out: str, choose: Callable[[], tuple[Any, str]]) -> tuple[Any, str]:
    """(precision, reason) of a store or a training, chosen once and kept in the folder `out`: what is resumed keeps it
    even where a new measurement would differ."""
    path = join(out, "precision.json")
    if exists(path):
        kept = read_json(path)
        return kept["precision"], kept["reason"]
    precision, reason = choose()
    write_json_atomic(path, {"precision": precision, "reason": reason})
    return precision, reason


def _precision(model: ColBERT | PooledModel, requested: str) -> tuple[Any, str]:
    import ray

    device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    if device == "cuda" and requested == "auto":
        import torch

        if not torch.cuda.is_available():
            return "bf16", "the cluster has GPUs"
    return choose_precision(model, requested, device, threads=1)


def _load(source: str, config: Config, *, given: bool = False) -> ColBERT:
    """Whatever is accepted as `model.backbone`, or as `teacher.checkpoint` when it is `given` as a finished teacher."""
    source = os.path.expanduser(source)
    m = config.model
    wanted = ColBERTSettings(
        dim=m.dim,
        query_maxlen=m.query_maxlen,
        doc_maxlen=m.doc_maxlen,
        mask_punctuation=m.mask_punctuation,
        similarity=m.similarity,
    )
    # The seed is no part of a given teacher's fingerprint, so nothing of it may depend on the seed.
    seed = 0 if given else config.run.seed
    loaded = load_any(source, wanted, encoder=m.backbone if given else None, seed=seed, dropout=m.dropout)
    if given and loaded.kind == "encoder":
        say(f"teacher.checkpoint: {source} is a bare encoder; its projection is drawn at random, not trained")
    model = loaded.model
    if model.settings.dim != m.dim:
        raise UserError(
            "the checkpoint has another dimension",
            where="model.dim",
            expected=str(model.settings.dim),
            found=str(m.dim),
        )
    for key in ("query_maxlen", "doc_maxlen", "mask_punctuation", "similarity"):
        mine, asked = getattr(model.settings, key), getattr(m, key)
        if mine != asked:
            say(f"model.{key}: {mine} is taken from {source} ({asked} in the configuration)")
    return model


def _local(source: str) -> AbstractContextManager[str]:
    """A model's source for the libraries that load it: what lies at a URI is downloaded for the time being."""
    return local_copy(source) if "://" in source else nullcontext(source)


def _fit(task: TrainingTask, out: str, section: TrainingConfig) -> TrainingOutcome:
    callbacks = load_callbacks(section.callbacks, task.stage)
    return fit(task, out=out, workers=section.workers, max_failures=section.max_failures, callbacks=callbacks)


def _task(
    context: RunContext, stage: str, made_of: str, start: str, model: ColBERT, keep: str | None = None
) -> TrainingTask:
    config = context.config
    section = config.teacher if stage == "teacher" else config.distill
    home = keep or context.path(checkpoints_of(stage, made_of))
    precision, reason = _agreed_precision(home, lambda: _precision(model, section.precision))
    say(f"{stage}: {precision} ({reason})")
    if section.evaluate_every and "dev" not in Collection.open(context.run).splits:
        raise UserError("the collection has no dev split to measure on", where=f"{stage}.evaluate_every")
    return TrainingTask(
        stage=stage,
        run=context.run,
        start=start,
        fingerprint=made_of,
        seed=config.run.seed if stage == "teacher" else distill_seed(config),
        settings=section,
        precision=precision,
        dropout=config.model.dropout,
        positive_grade=config.collection.positive_grade,
        labels=context.labels,
        teacher=None if stage == "teacher" else context.path("teacher"),
    )


def _training_figures(task: TrainingTask, outcome: TrainingOutcome) -> dict[str, Any]:
    losses = [record["loss"] for record in outcome.metrics]
    targets = targets_of(outcome.metrics)
    student = task.distillation
    if student and task.objective.has_teacher and (notice := degenerate(targets, student.temperature)):
        say(f"{task.stage}: {notice}")
    if outcome.best is not None:
        say(f"{task.stage}: best on dev MRR@10 {outcome.best:.4f} at step {outcome.kept_step} of {outcome.steps}")
    return {
        "count": outcome.steps,
        "unit": "steps",
        "workers": outcome.workers,
        "precision": task.precision,
        "objective": task.objective.name,
        "score_scale": outcome.score_scale,
        **targets,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "weights": outcome.weights,
        "kept_step": outcome.kept_step,
        "dev_mrr@10": outcome.best,
    }


def _store_figures(store: EmbeddingStore) -> dict[str, Any]:
    return {
        "count": store.num_passages,
        "unit": "passages",
        "tokens": store.num_tokens,
        "bytes": store.manifest["bytes"],
        "shards": store.num_shards,
        "precision": store.manifest.get("precision"),
        **({"set_aside": [e["passage_id"] for e in aside]} if (aside := store.manifest.get("set_aside")) else {}),
    }
