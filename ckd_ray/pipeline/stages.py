"""The stages of a run, in order: what each depends on, which settings count, and the call that does it.

A stage's fingerprint covers its settings and the fingerprints of its inputs, so a change reaches exactly what follows
from it. The settings are every key of the stage's section that is not marked `OPERATIONAL` in the schema, but for those
that the rest of the configuration leaves unread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ckd_ray.config import Config
from ckd_ray.config.schema import TrainingConfig
from ckd_ray.distill.objectives import CONDITIONAL_KEYS, objective_of, scorers_of
from ckd_ray.errors import UserError
from ckd_ray.files import file_signature
from ckd_ray.model.sources import signature
from ckd_ray.runs.directory import RunContext
from ckd_ray.runs.fingerprint import fingerprint

# Keys of a training that count where it is measured on dev.
_MEASURING = frozenset({"patience", "dev_queries", "dev_passages"})
# Keys of `retrieve` that exact search does not read.
_APPROXIMATE = frozenset({"cells", "nprobe", "candidates"})


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        folder: the artefact that says, by its manifest, that the stage is done.
        inputs: names of the stages it reads; a function of the configuration.
        settings: the part of the configuration that changes the result.
        work: does it; returns figures for the closing line (`count`, `unit`) and the manifest.
        beside: folders that are written together with the artefact, each with a manifest of its own.
        whole: the folder is replaced by a new one, all at once (see `artefact.make`).
    """

    name: str
    folder: str
    inputs: Callable[[Config], tuple[str, ...]]
    settings: Callable[[Config], dict[str, Any]]
    work: Callable[[RunContext, str], dict[str, Any]]
    beside: tuple[str, ...] = ()
    whole: bool = False


def _collection(config: Config) -> dict[str, Any]:
    return config.collection.for_fingerprint()


def _teacher(config: Config) -> dict[str, Any]:
    model = config.model.for_fingerprint()
    backbone = signature(config.model.backbone)
    if backbone:  # contents count, not where they lie
        del model["backbone"]
    given = config.teacher.checkpoint
    if given is not None:
        # A .dnn file takes its tokenizer and configuration from the backbone. Dropout is for training alone.
        files = signature(given) + (backbone if given.endswith(".dnn") else [])
        return {"model": model | {"dropout": 0.0}, "checkpoint": None if files else given, "files": files}
    return {
        "model": model,
        "files": backbone,
        "teacher": config.teacher.for_fingerprint({"checkpoint", *_unmeasured(config.teacher)}),
        "seed": config.run.seed,
        "positive_grade": config.collection.positive_grade,
    }


def _unmeasured(section: TrainingConfig) -> frozenset[str]:
    """The keys that a training without measurements on dev does not read."""
    return frozenset() if section.evaluate_every else _MEASURING


def _embed(config: Config) -> dict[str, Any]:
    learned = {} if config.embed.codec == "fp16" else {"seed": config.run.seed}
    return {**config.embed.for_fingerprint(), **learned}


def _retrieve(config: Config) -> dict[str, Any]:
    r = config.retrieve
    if r.engine == "exact":
        return r.for_fingerprint(_APPROXIMATE)
    return {**r.for_fingerprint(), "seed": config.run.seed}


def _label(config: Config) -> dict[str, Any]:
    if config.label.token_vote == "feedback":
        return config.label.for_fingerprint({"neighbours"})
    settings = {**config.label.for_fingerprint(), "seed": config.run.seed}
    if config.label.neighbours == "faiss":
        settings |= {"cells": config.retrieve.cells, "nprobe": config.retrieve.nprobe}
    return settings


def _ensemble(config: Config) -> dict[str, Any]:
    scorers = scorers_of(config.distill)
    backbone = signature(config.model.backbone) or config.model.backbone
    return {
        "scorers": list(scorers),
        "depth": config.distill.negatives_depth,
        "positive_grade": config.collection.positive_grade,
        **({"backbone": backbone, "precision": config.embed.precision} if "encoder" in scorers else {}),
    }


def _cross_encoder(config: Config) -> dict[str, Any]:
    c = config.cross_encoder
    if c.scores is not None:
        return {"scores": c.scores, "file": file_signature(c.scores)}
    settings = {**c.for_fingerprint({"scores"}), "depth": scored_depth(config)}
    files = signature(c.model) if c.model else []
    return {**settings, "files": files, "positive_grade": config.collection.positive_grade}


def scored_depth(config: Config) -> int:
    """Hard negatives a query that a cross-encoder scores."""
    depth = config.cross_encoder.depth
    return config.distill.negatives_depth if depth == "auto" else depth


def _distill(config: Config) -> dict[str, Any]:
    d = config.distill
    unread = CONDITIONAL_KEYS - objective_of(config).keys(d)
    return {
        "distill": d.for_fingerprint({"seed", *unread, *_unmeasured(d)}),
        "dropout": config.model.dropout,
        "seed": distill_seed(config),
        "positive_grade": config.collection.positive_grade,
    }


def distill_seed(config: Config) -> int:
    """`distill.seed`, or `run.seed` when that is null."""
    return config.run.seed if config.distill.seed is None else config.distill.seed


def skips_own_passage(config: Config) -> bool:
    """Whether a passage with the query's own id is left out of its results (`evaluate.skip_same_id`).

    `auto`: for BEIR collections, whose own evaluation does so since some of their queries are passages of the corpus.
    Elsewhere (MS MARCO) passages and queries are numbered independently, and an equal id means nothing.
    """
    chosen = config.evaluate.skip_same_id
    if chosen != "auto":
        return chosen
    c = config.collection
    return c.format == "beir" or (c.format == "ir_datasets" and (c.path or "").startswith("beir/"))


def _evaluate(config: Config) -> dict[str, Any]:
    settings = {**config.evaluate.for_fingerprint(), "skip_same_id": skips_own_passage(config)}
    search = {"search": _retrieve(config)} if config.evaluate.engine == "retrieve" else {}
    # With a given teacher nothing upstream depends on the backbone, and its row of the table still does.
    backbone = signature(config.model.backbone) or config.model.backbone
    encoder = {"backbone": backbone} if "encoder" in config.evaluate.baselines else {}
    return {**settings, "embed": _embed(config), **search, **encoder}


def _distill_inputs(config: Config) -> tuple[str, ...]:
    return ("collection", "teacher", "embed", "retrieve", *objective_of(config).stages(config.distill))


def _work(name: str) -> Callable[[RunContext, str], dict[str, Any]]:
    """The function of that name in `ckd_ray.pipeline.work`, imported when it is called (it needs Ray and torch)."""

    def call(context: RunContext, made_of: str) -> dict[str, Any]:
        from ckd_ray.pipeline import work

        result: dict[str, Any] = getattr(work, name)(context, made_of)
        return result

    return call


STAGES: tuple[Stage, ...] = (
    Stage("collection", "corpus", lambda c: (), _collection, _work("collection"), ("queries",), whole=True),
    Stage("teacher", "teacher", lambda c: ("collection",), _teacher, _work("teacher"), whole=True),
    Stage("embed", "embeddings", lambda c: ("collection", "teacher"), _embed, _work("embed")),
    Stage("retrieve", "rankings", lambda c: ("embed",), _retrieve, _work("retrieve")),
    Stage("label", "labels", lambda c: ("retrieve",), _label, _work("label")),
    Stage("ensemble", "ensemble", lambda c: ("retrieve",), _ensemble, _work("ensemble")),
    Stage("cross_encoder", "cross_scores", lambda c: ("retrieve",), _cross_encoder, _work("cross_encoder")),
    Stage("distill", "student", _distill_inputs, _distill, _work("distill"), whole=True),
    Stage("evaluate", "evaluation", lambda c: ("distill", "embed"), _evaluate, _work("evaluate")),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)
# Folders of a run that belong to a stage without being its artefact.
BESIDE = ("queries", "student_embeddings", "checkpoints", "index", "exports", "compare", "tune", "baselines")


def check_stage_names(start: str | None, until: str) -> None:
    """Raises UserError for a `--from` or `--until` that names no stage."""
    for option, name in (("--from", start), ("--until", until)):
        if name is not None and name not in STAGE_NAMES:
            raise UserError("unknown stage", where=option, expected=", ".join(STAGE_NAMES), found=name)


def needed(config: Config, until: str) -> list[Stage]:
    """The stages that `until` follows from, itself included, in order."""
    wanted = {until}
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted |= set(stage.inputs(config))
    return [stage for stage in STAGES if stage.name in wanted]


def made_of(stage: Stage, config: Config, done: dict[str, str], source: str) -> str:
    """The fingerprint of a stage, given those of its inputs (`done`) and of the collection's files (`source`)."""
    inputs = {name: done[name] for name in stage.inputs(config)}
    extra = {"source": source} if stage.name == "collection" else {}
    return fingerprint(stage=stage.name, settings=stage.settings(config), inputs=inputs, **extra)
