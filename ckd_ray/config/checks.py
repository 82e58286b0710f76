"""Combinations of keys that cannot work; each problem names the key to change."""

from __future__ import annotations

from collections.abc import Iterator

from ckd_ray.config.schema import Config


def impossible_combinations(config: Config) -> Iterator[tuple[str, str]]:
    """(path of the key, what is wrong and how to mend it)."""
    yield from _collection(config)
    if config.retrieve.depth < config.label.feedback_passages:
        yield "retrieve.depth", f"must be at least label.feedback_passages ({config.label.feedback_passages})"
    if config.distill.negatives_depth > config.retrieve.depth:
        yield "distill.negatives_depth", f"must be at most retrieve.depth ({config.retrieve.depth})"
    if config.distill.expansion_size > config.label.clusters:
        yield "distill.expansion_size", f"must be at most label.clusters ({config.label.clusters})"
    if config.distill.objective == "label_smoothing" and config.distill.smoothing == 0:
        yield "distill.smoothing", "objective label_smoothing needs a share above 0 (0.1 is usual)"
    if config.distill.objective == "cross_encoder":
        yield (
            "distill.objective",
            "cross_encoder cannot be run yet: its scores have no source in this version",
        )
    for name in ("teacher", "distill"):
        section = getattr(config, name)
        if section.accumulate > section.batch_size:
            yield f"{name}.accumulate", f"must be at most {name}.batch_size ({section.batch_size})"
        if section.accumulate > 1 and config.model.dropout > 0:
            yield (
                "model.dropout",
                f"must be 0 with {name}.accumulate above 1: parts are encoded twice and must agree",
            )
    yield from _measures(config)


def _collection(config: Config) -> Iterator[tuple[str, str]]:
    c = config.collection
    if c.format == "docstrings":
        for key in ("path", "passages", "queries", "qrels"):
            if getattr(c, key):
                yield f"collection.{key}", "has no meaning for format docstrings; set collection.format"
        return
    if c.packages is not None:
        yield "collection.packages", "counts for format docstrings only"
    if c.format == "ir_datasets":
        if not c.path:
            yield "collection.path", "format ir_datasets needs an id, such as msmarco-passage"
    elif not c.path and not (c.passages and c.queries and c.qrels):
        yield (
            "collection.path",
            f"format {c.format} needs a folder, or passages, queries and qrels as single files",
        )


def _measures(config: Config) -> Iterator[tuple[str, str]]:
    from ckd_ray.evaluate.names import parse_measure

    for i, name in enumerate(config.evaluate.measures):
        try:
            parse_measure(name, config.evaluate.relevance_threshold)
        except ValueError as error:
            yield f"evaluate.measures[{i}]", str(error)
