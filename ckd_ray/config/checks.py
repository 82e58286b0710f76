"""Combinations of keys that cannot work, as far as the schema can tell; each problem names the key to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckd_ray.config.measures import cannot_compute, computed, parse_measure
from ckd_ray.config.schema import Config


def schema_problems(config: Config) -> Iterator[tuple[str, str]]:
    """(path of the key, the problem and its fix)."""
    yield from _collection(config)
    if config.run.storage.startswith("hf://"):
        yield "run.storage", "a run cannot lie on the hub; ckd-ray export --push uploads its model"
    if config.retrieve.depth < config.label.depths[-1]:
        yield "retrieve.depth", f"must be at least label.feedback_passages ({config.label.depths[-1]})"
    if config.retrieve.engine == "centroids" and config.embed.codec == "fp16":
        yield "retrieve.engine", "centroids needs a residual codec: set embed.codec: residual2, or take faiss or exact"
    if config.distill.negatives_depth > config.retrieve.depth:
        yield "distill.negatives_depth", f"must be at most retrieve.depth ({config.retrieve.depth})"
    if config.distill.expansion_size > config.label.clusters:
        yield "distill.expansion_size", f"must be at most label.clusters ({config.label.clusters})"
    yield from _cross_encoder(config)
    for name in ("teacher", "distill"):
        section = getattr(config, name)
        if section.accumulate > section.batch_size:
            yield f"{name}.accumulate", f"must be at most {name}.batch_size ({section.batch_size})"
        if section.patience and not section.evaluate_every:
            yield f"{name}.patience", f"counts measurements on dev: set {name}.evaluate_every"
        fewest, _, most = str(section.workers).partition("-")
        if most and int(fewest) > int(most):
            yield f"{name}.workers", f"expected the smaller number first, {most}-{fewest}"
        elif name == "teacher" and config.teacher.checkpoint:
            continue  # nothing is trained
        elif section.workers != "auto" and int(most or fewest) > section.batch_size:
            yield f"{name}.workers", f"must be at most {name}.batch_size ({section.batch_size})"
    bits = {"residual1": 1, "residual2": 2, "residual4": 4}.get(config.embed.codec, 8)
    if config.model.dim * bits % 8:
        yield "model.dim", f"must be a multiple of {8 // bits} for embed.codec {config.embed.codec}"
    yield from _measures(config)
    yield from _listed_twice(config)


def _collection(config: Config) -> Iterator[tuple[str, str]]:
    c = config.collection
    if c.format == "docstrings":
        for key in ("path", "passages", "queries", "qrels", "columns"):
            if getattr(c, key):
                yield f"collection.{key}", "has no meaning for format docstrings; set collection.format"
        return
    if c.columns and c.format in ("msmarco", "ir_datasets"):
        yield "collection.columns", f"has no meaning for format {c.format}; csv reads TSV files with a header line"
    same_file = "dev" in c.qrels and c.qrels["dev"] == c.qrels.get("train")
    if same_file or ("dev" not in c.qrels and c.dev == c.train):
        # Of test queries that are trained on, too, the collection stage counts and warns: NanoBEIR has one split.
        found = c.qrels["dev"] if same_file else c.train
        yield "collection.dev", f"{found!r} is trained on, too, so that measurements on it would mean nothing"
    if c.packages is not None:
        yield "collection.packages", "counts for format docstrings only"
    if c.format == "ir_datasets":
        if not c.path:
            yield "collection.path", "format ir_datasets needs an id, such as msmarco-passage"
    elif not c.path and not (c.passages and c.queries and c.qrels):
        yield ("collection.path", f"format {c.format} needs a folder, or passages, queries and qrels as single files")
    if c.format != "ir_datasets" and not c.path:
        for split in sorted({*c.queries} ^ {*c.qrels}):
            key = "qrels" if split in c.queries else "queries"
            yield f"collection.{key}.{split}", "is missing: a split needs both its queries and its qrels"


def _cross_encoder(config: Config) -> Iterator[tuple[str, str]]:
    c, wanted = config.cross_encoder, config.distill.negatives_depth
    if c.scores and c.model:
        yield "cross_encoder.model", "cannot be given beside cross_encoder.scores; set one of the two to null"
    if c.depth != "auto" and c.depth < wanted:
        yield "cross_encoder.depth", f"must be at least distill.negatives_depth ({wanted}), or auto"
    elif c.depth != "auto" and c.depth > config.retrieve.depth:
        yield "cross_encoder.depth", f"must be at most retrieve.depth ({config.retrieve.depth})"


def _measures(config: Config) -> Iterator[tuple[str, str]]:
    evaluate = config.evaluate
    seen: set[str] = set()
    for i, name in enumerate(evaluate.measures):
        path = f"evaluate.measures[{i}]"
        try:
            measure = parse_measure(name, evaluate.relevance_threshold)
        except (ValueError, TypeError) as error:
            yield path, str(error)
            continue
        cutoff = measure.params.get("cutoff")
        takes = measure.SUPPORTED_PARAMS
        wrong = [key for key, value in measure.params.items() if key not in takes or not takes[key].validate(value)]
        missing = [key for key, info in takes.items() if info.required and key not in measure.params]
        if "cutoff" in wrong or "cutoff" in missing or (cutoff is not None and cutoff < 1):
            yield path, f"{name!r} needs a cutoff, a whole number of 1 or more, such as {name.partition('@')[0]}@10"
        elif wrong or missing:
            yield path, f"{name!r}: parameter {', '.join(wrong + missing)} is missing or out of range"
        elif cutoff is not None and cutoff > evaluate.depth:
            yield path, f"{name!r} looks deeper than evaluate.depth ({evaluate.depth}) ranks; raise evaluate.depth"
        elif str(measure) in seen:
            yield path, f"{name!r} is listed twice"
        elif reason := cannot_compute(measure):
            yield path, f"{name!r} cannot be computed: {reason}; what can be: {', '.join(computed())}"
        seen.add(str(measure))


def _listed_twice(config: Config) -> Iterator[tuple[str, str]]:
    lists: dict[str, list[Any]] = {
        "evaluate.splits": config.evaluate.splits,
        "evaluate.baselines": config.evaluate.baselines,
        "compare.objectives": config.compare.objectives or [],
        "compare.seeds": config.compare.seeds,
        "tracking.to": config.tracking.to,
    }
    for key, values in lists.items():
        for i, value in enumerate(values):
            if value in values[:i]:
                yield f"{key}[{i}]", f"{value!r} is listed twice"
