"""The collection stage: read the source into `corpus/` and `queries/`."""

from __future__ import annotations

from typing import Any

from ckd_ray.config import Config
from ckd_ray.pipeline.stage import Stage
from ckd_ray.progress import Progress
from ckd_ray.runs.artifact import content_fingerprint
from ckd_ray.runs.directory import RunContext


def fingerprint_settings(config: Config) -> dict[str, Any]:
    """The whole section."""
    return config.collection.for_fingerprint()


def run(context: RunContext, fingerprint: str) -> dict[str, Any]:
    """Build the collection."""
    from ckd_ray.data import build_collection

    with Progress("collection", None, "passages") as progress:
        built = build_collection(
            context.config.collection, context.paths.root, progress=lambda done, total: progress.reach(done, total)
        )
    return {"count": built.num_passages, "unit": "passages", **built.figures()}


STAGE = Stage(
    name="collection",
    inputs=lambda config: (),
    output=lambda run: run.corpus,
    extra_outputs=lambda run: (run.queries,),
    fingerprint_settings=fingerprint_settings,
    run=run,
    replace_atomically=True,
    # Later stages depend on the contents, wherever they were read from.
    identity=lambda corpus: str(content_fingerprint(corpus)),
)
