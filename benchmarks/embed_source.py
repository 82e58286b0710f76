"""What the embed benchmarks encode: a collection and a checkpoint in a new run directory, or a finished run."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common import note

from ckd_ray.checks import load_config
from ckd_ray.data import Collection, build_collection
from ckd_ray.embed.stream import EmbedJob
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.progress import set_quiet

QUICK_PASSAGES = 1500


@dataclass(frozen=True)
class Source:
    """A run directory that holds a collection and a teacher."""

    folder: str

    @property
    def collection(self) -> Collection:
        """Texts, ids and labels."""
        return Collection.open(self.folder)

    def job(self, out: str, texts: str = "passages", precision: str = "fp32") -> EmbedJob:
        """Encode these texts into the store `out`."""
        return EmbedJob(
            run=self.folder,
            texts=texts,
            checkpoint=f"{self.folder}/teacher",
            out=out,
            fingerprint=f"benchmark/{texts}",
            token_budget=load_config(None, []).embed.token_budget,
            precision=precision,  # type: ignore[arg-type]
        )


def source(args: argparse.Namespace) -> Source:
    """The run of `--run`, or a new one with an untrained projection: `--data`, or the installed documentation."""
    set_quiet(True)
    if args.run:
        return Source(str(Path(args.run).resolve()))
    return _built(args.data, args.quick)


@lru_cache(maxsize=1)
def _built(data: str | None, quick: bool) -> Source:
    folder = tempfile.mkdtemp(prefix="ckd-ray-benchmark-") + "/embed"
    values = [f"collection.limit={QUICK_PASSAGES if quick else 'null'}"]
    if data:
        values += ["collection.format=msmarco", f"collection.path={data}", "collection.packages=null"]
    config = load_config(None, values)
    note("reading the collection")
    build_collection(config.collection, folder)
    ColBERT.from_backbone(config.model.backbone, ColBERTSettings()).save(f"{folder}/teacher")
    return Source(folder)
