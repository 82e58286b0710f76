"""What each stage does, in terms of the other rooms. Each function has the name of its stage.

They take the run and the stage's fingerprint, fill the stage's folder, and return figures: `count` and `unit` for the
closing line, and whatever the stage found out on the way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckd_ray.collective.stream import LabelJob, label as label_queries
from ckd_ray.config import Config
from ckd_ray.data import Collection, build_collection
from ckd_ray.distill.task import TrainingTask
from ckd_ray.distill.trainer import fit
from ckd_ray.embed.encoder import choose_precision
from ckd_ray.embed.learn_codec import with_codec
from ckd_ray.embed.stream import EmbedJob, embed_texts, plan_shards
from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT, ColBERTSettings, is_checkpoint
from ckd_ray.model.sources import resolve_backbone
from ckd_ray.pipeline.context import RunContext
from ckd_ray.pipeline.stages import distill_seed
from ckd_ray.progress import Progress, say
from ckd_ray.retrieve.servers import SearchSettings, serving
from ckd_ray.retrieve.shard_range import choose_engine
from ckd_ray.retrieve.stream import RetrieveJob, retrieve as retrieve_queries
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.files import delete, exists, join, local_copy, new_folder, read_json, write_json_atomic


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
        model = _load(config.teacher.checkpoint, config)
        with new_folder(out) as folder:
            model.save(folder)
        return {"given": config.teacher.checkpoint}
    start = context.path("checkpoints", f"start-{made_of[:16]}")
    model = _load(config.model.backbone, config)
    with new_folder(start) as folder:
        model.save(folder)
    task = _task(context, "teacher", made_of, start, model)
    outcome = fit(task, out=out, workers=config.teacher.workers, max_failures=config.teacher.max_failures)
    delete(start)
    return _training_figures(task, outcome)


def embed(context: RunContext, made_of: str) -> dict[str, Any]:
    """Embed the corpus and all queries with the teacher."""
    checkpoint, out = context.path("teacher"), context.path("embeddings")
    store = embed_all(context, checkpoint, out, made_of, stage="embed", splits=Collection.open(context.run).splits)
    return _store_figures(store)


def retrieve(context: RunContext, made_of: str) -> dict[str, Any]:
    """Rank the corpus for every training query."""
    config = context.config.retrieve
    store = EmbeddingStore.open(context.path("embeddings", "passages"))
    count = len(Collection.open(context.run).queries("train").ids)
    settings = search_settings(context.config, store, count)
    say(f"retrieve: engine {settings.engine}")
    job = RetrieveJob(
        run=context.run,
        split="train",
        queries=context.path("embeddings", "queries.train"),
        out=context.path("rankings"),
        depth=config.depth,
    )
    with serving(store, settings, config.actors) as servers:
        retrieve_queries(job, servers, count)
    return {"count": count, "unit": "queries", "engine": settings.engine, "depth": config.depth}


def label(context: RunContext, made_of: str) -> dict[str, Any]:
    """Write collective relevance labels for every training query."""
    config = context.config
    store = EmbeddingStore.open(context.path("embeddings", "passages"))
    count = len(Collection.open(context.run).queries("train").ids)
    job = LabelJob(
        run=context.run,
        split="train",
        checkpoint=context.path("teacher"),
        passages=store.uri,
        rankings=context.path("rankings"),
        out=context.path("labels"),
        settings=config.label,
    )
    if config.label.token_vote == "feedback":
        queries_per_part = label_queries(job, None, count)
    else:
        settings = search_settings(config, store, count * config.label.clusters // 32)
        with serving(store, settings, config.retrieve.actors) as servers:
            queries_per_part = label_queries(job, servers, count)
    write_json_atomic(context.path("labels", "manifest.json"), {"queries_per_part": queries_per_part, "split": "train"})
    return {"count": count, "unit": "queries", "token_vote": config.label.token_vote}


def distill(context: RunContext, made_of: str) -> dict[str, Any]:
    """Distil the student, starting from the teacher's weights."""
    config = context.config
    start = context.path("teacher")
    with local_copy(start) as folder:
        model = ColBERT.from_pretrained(folder)
    task = _task(context, "distill", made_of, start, model)
    out = context.path("student")
    outcome = fit(task, out=out, workers=config.distill.workers, max_failures=config.distill.max_failures)
    return _training_figures(task, outcome)


def evaluate(context: RunContext, made_of: str) -> dict[str, Any]:
    """Teacher against student on the evaluation splits, by exact search."""
    from ckd_ray.pipeline.evaluation import evaluate_run

    return evaluate_run(context, made_of)


def embed_all(
    context: RunContext, checkpoint: str, out: str, made_of: str, *, stage: str, splits: list[str]
) -> EmbeddingStore:
    """Embed the corpus into `out`/passages and the queries of `splits` into `out`/queries.SPLIT."""
    config = context.config.embed
    precision, reason = _agreed_precision(out, checkpoint, config.precision)
    say(f"{stage}: {precision} ({reason})")
    collection = Collection.open(context.run)
    sizes = {f"queries.{split}": len(collection.queries(split).ids) for split in splits}
    jobs = []
    for texts, count in {"passages": collection.num_passages, **sizes}.items():
        job = EmbedJob(
            run=context.run,
            texts=texts,
            checkpoint=checkpoint,
            out=join(out, texts),
            fingerprint=f"{made_of}/{texts}",
            token_budget=config.token_budget,
            precision=precision,
        )
        if texts == "passages":
            # Queries stay in fp16: they are few, and read in every comparison.
            job = with_codec(replace(job, codec=config.codec), count, config, seed=context.config.run.seed, stage=stage)
        jobs.append((job, plan_shards(count, config.passages_per_shard)))
    return embed_texts(jobs, config, stage=stage)[0]


def search_settings(config: Config, store: EmbeddingStore, num_queries: int) -> SearchSettings:
    """The engine for so many queries over this store; `auto` decides by the work that exact search would be."""
    r = config.retrieve
    engine: str = r.engine
    if engine == "auto":
        engine = choose_engine(num_queries, config.model.query_maxlen, store.num_tokens, store.dim)
    return SearchSettings(engine, r.cells, r.nprobe, r.candidates, config.run.seed)


def _agreed_precision(out: str, checkpoint: str, requested: str) -> tuple[Any, str]:
    """The precision of a store is chosen once: a resumed run keeps it even where a new measurement would differ."""
    path = join(out, "precision.json")
    if exists(path):
        kept = read_json(path)
        return kept["precision"], kept["reason"]
    with local_copy(checkpoint) as folder:
        precision, reason = _precision(ColBERT.from_pretrained(folder), requested)
    write_json_atomic(path, {"precision": precision, "reason": reason})
    return precision, reason


def _precision(model: ColBERT, requested: str) -> tuple[Any, str]:
    import ray

    device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    if device == "cuda" and requested == "auto":
        import torch

        if not torch.cuda.is_available():
            return "bf16", "the cluster has GPUs"
    return choose_precision(model, requested, device, threads=1)


def _load(source: str, config: Config) -> ColBERT:
    """A checkpoint of ours, or a bare encoder with a new projection."""
    folder = resolve_backbone(source)
    if is_checkpoint(folder):
        model = ColBERT.from_pretrained(folder)
        if model.settings.dim != config.model.dim:
            raise UserError(
                "the checkpoint has another dimension",
                where="model.dim",
                expected=str(model.settings.dim),
                found=str(config.model.dim),
            )
        return model
    m = config.model
    settings = ColBERTSettings(
        dim=m.dim,
        query_maxlen=m.query_maxlen,
        doc_maxlen=m.doc_maxlen,
        mask_punctuation=m.mask_punctuation,
        similarity=m.similarity,
    )
    return ColBERT.from_backbone(source, settings, seed=config.run.seed, dropout=m.dropout)


def _task(context: RunContext, stage: str, made_of: str, start: str, model: ColBERT) -> TrainingTask:
    config = context.config
    section = config.teacher if stage == "teacher" else config.distill
    precision, reason = _precision(model, section.precision)
    say(f"{stage}: {precision} ({reason})")
    shared = {
        "steps", "batch_size", "learning_rate", "negatives", "warmup", "schedule", "weight_decay", "clip_norm",
        "accumulate", "checkpoint_every", "log_every",
    }  # fmt: skip
    values: dict[str, Any] = {name: getattr(section, name) for name in shared}
    if stage == "distill":
        d = config.distill
        names = (
            "objective",
            "temperature",
            "smoothing",
            "beta",
            "expansion_size",
            "zero_row_floor",
            "negatives_depth",
        )
        values |= {name: getattr(d, name) for name in names}
        values["hard_negatives"] = True
    return TrainingTask(
        stage=stage,
        run=context.run,
        start=start,
        fingerprint=made_of,
        seed=distill_seed(config) if stage == "distill" else config.run.seed,
        positive_grade=config.collection.positive_grade,
        precision=precision,
        dropout=config.model.dropout,
        **values,
    )


def _training_figures(task: TrainingTask, outcome: Any) -> dict[str, Any]:
    losses = [record["loss"] for record in outcome.metrics]
    return {
        "count": task.steps,
        "unit": "steps",
        "workers": outcome.workers,
        "precision": task.precision,
        "objective": task.objective,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }


def _store_figures(store: EmbeddingStore) -> dict[str, Any]:
    return {
        "count": store.num_passages,
        "unit": "passages",
        "tokens": store.num_tokens,
        "bytes": store.manifest["bytes"],
        "shards": store.num_shards,
        "precision": store.manifest.get("precision"),
    }
