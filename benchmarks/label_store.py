"""The run that the label benchmarks measure on: a given one, or a collection embedded with an untrained projection.

Rates do not depend on training; agreement and recall do, so figures to be quoted come from `--run` with a trained
teacher.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import note

from ckd_ray.data import Collection
from ckd_ray.store import EmbeddingStore


@dataclass(frozen=True)
class PreparedRun:
    """A run directory with its corpus, its embeddings (passages and train, dev and test queries) and its teacher."""

    folder: Path

    @property
    def passages(self) -> EmbeddingStore:
        """Token embeddings of the corpus."""
        return EmbeddingStore.open(str(self.folder / "embeddings" / "passages"))

    def queries(self, split: str = "train") -> EmbeddingStore:
        """Query embeddings of a split."""
        return EmbeddingStore.open(str(self.folder / "embeddings" / f"queries.{split}"))

    @property
    def collection(self) -> Collection:
        """Texts, ids and labels."""
        return Collection.open(str(self.folder))

    def describe(self) -> dict[str, Any]:
        """Sizes, for the printed settings."""
        store = self.passages
        return {"passages": store.num_passages, "tokens": store.num_tokens, "dim": store.dim}


def prepared_run(args: argparse.Namespace) -> PreparedRun:
    """The run of `--run`, or a new one: `--data` (or installed documentation), cut to 2,000 passages by `--quick`."""
    if args.run:
        return PreparedRun(Path(args.run).resolve())
    from ckd_ray.checks import load_config
    from ckd_ray.pipeline.runner import run_stages
    from ckd_ray.progress import set_quiet
    from ckd_ray.ray_util.session import connected

    storage = tempfile.mkdtemp(prefix="ckd-ray-benchmark-")
    values = [f"run.storage={storage}", "run.name=label", "teacher.steps=1", "teacher.batch_size=2"]
    if args.data:
        values += ["collection.format=msmarco", f"collection.path={args.data}", "collection.packages=null"]
    values.append(f"collection.limit={2000 if args.quick else 'null'}")
    note("embedding the collection")
    set_quiet(True)
    with connected("local"):
        run_stages(load_config(None, values), until="embed")
    return PreparedRun(Path(storage) / "label")
