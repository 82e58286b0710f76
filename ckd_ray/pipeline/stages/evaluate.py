"""The evaluate stage: teacher against student on the evaluation splits, beside the baselines of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckd_ray.config import Config
from ckd_ray.files import join, write_json_atomic
from ckd_ray.model.sources import identity
from ckd_ray.pipeline.stage import Stage
from ckd_ray.pipeline.stages import embed, retrieve
from ckd_ray.progress import say, without_keys
from ckd_ray.runs.artifact import identity_of, make
from ckd_ray.runs.directory import RunContext
from ckd_ray.runs.fingerprint import fingerprint as combined_fingerprint


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


def fingerprint_settings(config: Config) -> dict[str, Any]:
    """The section, and how the student's embeddings are made and searched."""
    settings = {**config.evaluate.for_fingerprint(), "skip_same_id": skips_own_passage(config)}
    search = {"search": retrieve.fingerprint_settings(config)} if config.evaluate.engine == "retrieve" else {}
    # With a given teacher nothing upstream depends on the backbone, and its row of the table still does.
    backbone = identity(config.model.backbone)
    encoder = {"backbone": backbone} if "encoder" in config.evaluate.baselines else {}
    return {**settings, "embed": embed.fingerprint_settings(config), **search, **encoder}


def run(context: RunContext, fingerprint: str) -> dict[str, Any]:
    """Measure teacher and student (in a variant: the student alone) on every evaluation split of the collection.

    Writes `evaluation/SYSTEM.SPLIT.run` (TREC), `measures.json`, `SYSTEM.SPLIT.per_query.json`, `comparison.json`
    (teacher against student) and, but for a variant, `table.json` (these and the run's baselines) and the student's
    card.
    """
    from ckd_ray.data import Collection
    from ckd_ray.evaluate.table import TABLE, build_table
    from ckd_ray.pipeline.baselines import measure_baselines
    from ckd_ray.pipeline.evaluation import Found, evaluation_splits, measure_system, write_measures
    from ckd_ray.pipeline.export import write_student_card

    config, paths = context.config, context.paths
    collection = Collection.open(paths.root)
    splits = evaluation_splits(config, collection)
    if not splits:
        say("evaluate: the collection has none of the splits of evaluate.splits")
    embed_student(context, splits)
    found: Found = {split: {} for split in splits}
    for system in ("student",) if paths.variant_name else ("teacher", "student"):
        measured = measure_system(context, system, paths.embeddings_of(system), splits, paths.evaluation)
        for split, measures in measured.items():
            found[split][system] = measures
    write_measures(paths.evaluation, found, config, collection)
    systems = found
    if not paths.variant_name:
        baselines = measure_baselines(context, splits, config.evaluate.baselines)
        systems = {split: {**baselines.measures(split), **of_split} for split, of_split in found.items()}
        table = build_table(systems)
        write_json_atomic(join(paths.evaluation, TABLE), without_keys({**table, "left_out": baselines.left_out}))
        write_student_card(paths)
    for split, of_split in systems.items():
        for system, measures in of_split.items():
            context.tracking.summary({f"evaluate/{split}/{system}/{name}": v for name, v in measures.mean.items()})
    count = sum(collection.num_queries(split) for split in splits)
    figures = {"count": count, "unit": "queries", "splits": splits, "engine": config.evaluate.engine}
    return {**figures, "student": identity_of(paths.student)}


def embed_student(context: RunContext, splits: Sequence[str]) -> None:
    """`student_embeddings/`, unless they are there. They have a fingerprint of their own, so that other measures or
    depths do not embed the corpus again."""
    from ckd_ray.pipeline.embedding import embed_all, reopen_for

    student, out = context.paths.student, context.paths.student_embeddings
    made_of = combined_fingerprint(student=identity_of(student), embed=identity_of(context.paths.embeddings))
    reopen_for(out, splits)

    def work() -> dict[str, Any]:
        store = embed_all(context, student, out, made_of, stage="evaluate", splits=splits)
        return {"passages": store.num_passages, "figures": {"student": identity_of(student)}}

    make(out, made_of, work)


STAGE = Stage(
    name="evaluate",
    inputs=lambda config: ("distill", "embed"),
    output=lambda run: run.evaluation,
    fingerprint_settings=fingerprint_settings,
    run=run,
)
