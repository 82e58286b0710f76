"""What a user would pick instead of a student: the encoder as it is, and BM25. Measured once a run.

Each is an artifact below `baselines/` of the run directory. It depends on the collection, on the settings of the
evaluation and (the encoder) on the backbone, but on no teacher or student, so further students of the run share it.
Measures, TREC runs and the values of every query are kept; embeddings and rankings are removed once they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import ray

from ckd_ray.config import Config
from ckd_ray.data import Collection
from ckd_ray.errors import UserError
from ckd_ray.evaluate.bm25 import rank_bm25
from ckd_ray.evaluate.measures import Measures
from ckd_ray.files import delete, join, new_folder, parent, read_json, write_json_atomic
from ckd_ray.model.pooled import PooledModel
from ckd_ray.model.sources import identity
from ckd_ray.pipeline.embedding import embed_all, reopen_for
from ckd_ray.pipeline.evaluation import measure_rankings, measure_system
from ckd_ray.pipeline.stages.evaluate import skips_own_passage
from ckd_ray.progress import say
from ckd_ray.ray_util.waiting import answer
from ckd_ray.runs.artifact import content_fingerprint, is_made, make, remove_altered
from ckd_ray.runs.directory import RunContext, system_rankings
from ckd_ray.runs.fingerprint import fingerprint


@dataclass
class Baselines:
    """folders: name -> where its measures are; left_out: name -> why it was not measured."""

    folders: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def measures(self, split: str) -> dict[str, Measures]:
        """Of every baseline that was measured, on one split."""
        return {
            name: Measures.of(read_json(join(folder, f"{name}.{split}.per_query.json")))
            for name, folder in self.folders.items()
        }


def measure_baselines(context: RunContext, splits: Sequence[str], names: Sequence[str]) -> Baselines:
    """Measure the baselines `names` (of `evaluate.baselines`) on `splits`, unless they are there. Ray must be
    connected. One that cannot be measured is left out, and a line says why."""
    found = Baselines()
    ways: dict[str, Callable[[RunContext, list[str]], str]] = {"encoder": _encoder, "bm25": _bm25}
    for name, way in ways.items():
        if name not in names or not splits:
            continue
        try:
            found.folders[name] = way(context, list(splits))
        except LeftOutError as reason:
            found.left_out[name] = str(reason)
            say(f"baselines: {name} is left out: {reason}")
    return found


class LeftOutError(Exception):
    """A baseline cannot be measured; the message says why, in one line."""


def baseline_fingerprint(context: RunContext, splits: list[str], **more: Any) -> str:
    """The collection and what the evaluation asks of it."""
    e = context.config.evaluate
    collection = content_fingerprint(context.paths.corpus)
    settings = {"measures": e.measures, "depth": e.depth, "relevance_threshold": e.relevance_threshold}
    skips = skips_own_passage(context.config)
    return fingerprint(collection=collection, splits=splits, settings=settings, skip_same_id=skips, **more)


def _encoder(context: RunContext, splits: list[str]) -> str:
    """The encoder of `model.backbone` as it is: a vector a text, searched exactly. Returns the folder.

    Raises:
        LeftOutError: the backbone is a ColBERT model, or cannot be loaded.
    """
    folder, embeddings = context.paths.baseline("encoder"), context.paths.encoder_embeddings
    made_of = baseline_fingerprint(context, splits, baseline="encoder", **encoder_settings(context.config))
    if not _is_verified(folder, made_of):
        embed_encoder(context, splits)

        def work() -> dict[str, Any]:
            found = measure_system(context, "encoder", embeddings, splits, folder, engine="exact")
            return _written(context, "encoder", folder, found)

        make(folder, made_of, work)
    delete(embeddings)  # not before the manifest says that they are not needed any more
    return folder


def encoder_settings(config: Config) -> dict[str, Any]:
    """What the vectors of the encoder as it is depend on, besides the texts: the backbone's files (its name if it comes
    from a package or a hub) and the precision. The precision is that of the store, but never int8, which would rank a
    little differently from the encoder that a user would use instead."""
    backbone = identity(config.model.backbone)
    precision = config.embed.precision
    return {"backbone": backbone, "precision": "auto" if precision == "int8" else precision}


def _load(backbone: str) -> PooledModel:
    try:
        return PooledModel.from_backbone(backbone)
    except UserError as error:
        found = f" ({error.found})" if error.found not in (None, backbone) else ""
        raise LeftOutError(f"model.backbone {backbone}: {error.problem}{found}") from error


def embed_encoder(context: RunContext, splits: list[str]) -> None:
    """Embed the corpus and the queries of `splits` with the encoder as it is, unless they are there: one row a text,
    streamed into stores like those of teacher and student. The model is saved beside them, where all workers see it.

    Raises:
        LeftOutError: the backbone is a ColBERT model, or cannot be loaded.
    """
    out, settings = context.paths.encoder_embeddings, encoder_settings(context.config)
    made_of = fingerprint(collection=content_fingerprint(context.paths.corpus), **settings)
    checkpoint = join(out, "encoder")
    reopen_for(out, splits)
    if is_made(out, made_of):
        return
    model = _load(context.config.model.backbone)

    def work() -> None:
        with new_folder(checkpoint) as folder:
            model.save(folder)
        options: dict[str, Any] = {"stage": "baseline encoder", "splits": splits, "precision": settings["precision"]}
        embed_all(context, checkpoint, out, made_of, pooled=True, **options)

    make(out, made_of, work)


def _bm25(context: RunContext, splits: list[str]) -> str:
    """BM25, in a Ray task of its own. Returns the folder.

    Raises:
        LeftOutError: the collection is too large for one process, or bm25s is missing.
    """
    folder, evaluate = context.paths.baseline("bm25"), context.config.evaluate
    passages = Collection.open(context.paths.root).num_passages
    if passages > evaluate.bm25_passages:
        raise LeftOutError(
            f"it holds the corpus in the memory of one process, and {passages:,} passages are more than"
            f" evaluate.bm25_passages ({evaluate.bm25_passages:,})"
        )

    made_of = baseline_fingerprint(context, splits, baseline="bm25")
    if _is_verified(folder, made_of):
        return folder
    if find_spec("bm25s") is None:
        raise LeftOutError("bm25s is not installed; pip install bm25s")

    def work() -> dict[str, Any]:
        say("baselines: bm25")
        depth = evaluate.depth + skips_own_passage(context.config)
        task = ray.remote(num_cpus=1)(rank_bm25)
        answer("BM25", task.remote(context.paths.root, splits, system_rankings(folder, "bm25"), depth))
        return _written(context, "bm25", folder, measure_rankings(context, "bm25", splits, folder, evaluate.depth))

    make(folder, made_of, work)
    return folder


def _is_verified(folder: str, made_of: str) -> bool:
    """Whether a baseline is there and undamaged: it is no input of a stage, so the runner does not verify it."""
    return is_made(folder, made_of) and not remove_altered(folder)


def _written(context: RunContext, name: str, folder: str, found: dict[str, Measures]) -> dict[str, Any]:
    """Write the measures; returns the entries of the manifest."""
    means = {split: {name: measures.mean} for split, measures in found.items()}
    write_json_atomic(join(folder, "measures.json"), {"splits": means})
    for split, measures in found.items():
        write_json_atomic(join(folder, f"{name}.{split}.per_query.json"), measures.per_query)
    delete(parent(system_rankings(folder, name)))
    collection = Collection.open(context.paths.root)
    count = sum(collection.num_queries(split) for split in found)
    return {"figures": {"count": count, "unit": "queries", "splits": list(found)}}
