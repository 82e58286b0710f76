"""The comparison as one resumable job: all students share the run's upstream stages, and each is a variant of the run.

Manifests tell what is finished: of the stages of a variant, of the run's baselines, and of the teacher. After an
interruption the same command resumes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckd_ray.compare.plan import SETTINGS, Variant, objectives, variants
from ckd_ray.compare.table import System, build_table, render_markdown, render_text
from ckd_ray.config import Config
from ckd_ray.data import Collection
from ckd_ray.distill.objectives import BASELINE
from ckd_ray.errors import UserError
from ckd_ray.evaluate.significance import aligned
from ckd_ray.files import delete, join, read_json, write_atomic, write_json_atomic
from ckd_ray.pipeline.baselines import measure_baselines
from ckd_ray.pipeline.evaluation import evaluation_splits, measure_system, write_measures
from ckd_ray.pipeline.graph import needed
from ckd_ray.pipeline.runner import run_stages
from ckd_ray.pipeline.stages import evaluate
from ckd_ray.progress import say, without_keys
from ckd_ray.runs.artifact import content_fingerprint, fingerprint_of, make, seconds_of
from ckd_ray.runs.directory import RunContext, RunDir
from ckd_ray.runs.fingerprint import fingerprint
from ckd_ray.runs.lock import run_lock


def run_compare(config: Config, *, fresh: bool = False) -> dict[str, Any]:
    """Train and measure every objective and seed, measure the run's baselines and the teacher, and write
    `compare/table.json` and `table.md`. Ray must be connected. Returns the table.

    Args:
        fresh: train all students again; the stages upstream of them stay.
    """
    context = RunContext.of(config)
    run = context.paths
    if fresh:
        with run_lock(run.root):  # another command may be at work in it
            delete(run.compare)
    # Writes the run.json of the run itself, and refuses what cannot be measured before anything is trained.
    run_stages(config, until="collection")
    collection = Collection.open(run.root)
    splits = evaluation_splits(config, collection)
    if not splits:
        raise UserError(
            "nothing to compare on: the collection has none of the evaluation splits",
            where="evaluate.splits",
            expected=f"one of {', '.join(s for s in collection.splits if s != 'train') or 'dev, test'}",
        )
    planned = variants(config)
    for number, variant in enumerate(planned, 1):
        say(f"compare: {variant.objective}, seed {variant.seed} ({number} of {len(planned)})")
        run_stages(variant.config, variant=variant.folder)
        if not config.compare.keep_stores:
            delete(run.variant(variant.folder).student_embeddings)
    with run_lock(run.root):
        names = [name for name in config.evaluate.baselines if name != "bm25" or config.compare.bm25]
        baselines = measure_baselines(context, splits, names)
        systems = [System(name, [], _values([folder], name, splits)) for name, folder in baselines.folders.items()]
        systems.append(_teacher(context, splits))
        systems += [_objective(run, name, planned, splits) for name in objectives(config)]
        table = build_table(systems, collection.num_queries("train"))
        table |= {"budget": _budget(config), "run": run.root, "left_out": baselines.left_out}
        write_json_atomic(join(run.compare, "table.json"), without_keys(table))
        text = render_markdown(table).encode()
        write_atomic(join(run.compare, "table.md"), lambda stream: stream.write(text))
    return table


def show(table: dict[str, Any]) -> None:
    """The table for people."""
    say("")
    say(render_text(table))
    say("")
    say(join(RunDir(table["run"]).compare, "table.md"))


def _budget(config: Config) -> dict[str, Any]:
    d = config.distill
    return {name: getattr(d, name) for name in ("steps", "batch_size", "negatives", "negatives_depth")}


def _evaluation_of(context: RunContext, **inputs: Any) -> str:
    """The fingerprint of the settings and inputs of the evaluation."""
    collection = content_fingerprint(context.paths.corpus)
    return fingerprint(evaluate=evaluate.fingerprint_settings(context.config), collection=collection, **inputs)


def _teacher(context: RunContext, splits: list[str]) -> System:
    """The teacher without its expansion: what every student starts from."""
    folder = join(context.paths.compare, "teacher")
    embeddings = context.paths.embeddings
    identity = _evaluation_of(context, embeddings=fingerprint_of(embeddings))

    def work() -> dict[str, Any]:
        found = measure_system(context, "teacher", embeddings, splits, folder)
        collection = Collection.open(context.paths.root)
        write_measures(folder, {s: {"teacher": m} for s, m in found.items()}, context.config, collection)
        return {}

    make(folder, identity, work)
    return System("teacher", [], _values([folder], "teacher", splits))


def _objective(run: RunDir, name: str, planned: list[Variant], splits: list[str]) -> System:
    mine = [variant for variant in planned if variant.objective == name]
    students = [run.variant(variant.folder) for variant in mine]
    config = mine[0].config
    plain = next(variant.config for variant in planned if variant.objective == BASELINE.name)
    shared = needed(plain, "distill")
    labelling = sum(seconds_of(stage.output(run)) for stage in needed(config, "distill") if stage not in shared)
    return System(
        name,
        [variant.seed for variant in mine],
        _values([student.evaluation for student in students], "student", splits),
        float(np.mean([seconds_of(student.student) for student in students])),
        labelling,
        {key: getattr(config.distill, key) for key in sorted(SETTINGS)},
    )


def _values(folders: list[str], system: str, splits: list[str]) -> dict[str, dict[str, Any]]:
    """split -> measure -> (S, N), one row a folder. The queries are in the order of the collection's labels."""
    values: dict[str, dict[str, Any]] = {}
    for split in splits:
        found = {folder: read_json(join(folder, f"{system}.{split}.per_query.json")) for folder in folders}
        values[split] = {
            measure: np.stack(list(aligned({folder: one[measure] for folder, one in found.items()}).values()))
            for measure in found[folders[0]]
        }
    return values
