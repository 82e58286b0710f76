"""The embed stage: the corpus and all queries under the teacher."""

from __future__ import annotations

from typing import Any

from ckd_ray.config import Config
from ckd_ray.pipeline.stage import Stage
from ckd_ray.runs.artifact import identity_of
from ckd_ray.runs.directory import RunContext


def fingerprint_settings(config: Config) -> dict[str, Any]:
    """The section; a learned codec also depends on the seed."""
    learned = {} if config.embed.codec == "fp16" else {"seed": config.run.seed}
    return {**config.embed.for_fingerprint(), **learned}


def run(context: RunContext, fingerprint: str) -> dict[str, Any]:
    """Write the stores of passages and queries."""
    from ckd_ray.data import Collection
    from ckd_ray.pipeline.embedding import embed_all

    teacher, out = context.paths.teacher, context.paths.embeddings
    splits = Collection.open(context.paths.root).splits
    store = embed_all(context, teacher, out, fingerprint, stage="embed", splits=splits)
    figures = {
        "count": store.num_passages,
        "unit": "passages",
        "tokens": store.num_tokens,
        "bytes": store.manifest["bytes"],
        "shards": store.num_shards,
        "precision": store.manifest.get("precision"),
        "teacher": identity_of(teacher),
    }
    if skipped := store.manifest.get("set_aside"):
        figures["set_aside"] = [entry["passage_id"] for entry in skipped]
    return figures


STAGE = Stage(
    name="embed",
    inputs=lambda config: ("collection", "teacher"),
    output=lambda run: run.embeddings,
    fingerprint_settings=fingerprint_settings,
    run=run,
)
