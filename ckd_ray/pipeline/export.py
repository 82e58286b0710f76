"""`ckd-ray export`, and its model: a run's student or teacher as another library reads it, with a model card.

Needs no Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckd_ray.errors import UserError
from ckd_ray.evaluate.table import TABLE
from ckd_ray.files import (
    exists,
    join,
    last_part,
    local_copy,
    new_folder,
    read_json,
    with_ending,
    write_atomic,
)
from ckd_ray.inspection.export_labels import export_labels
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.exchange import FORMATS, write_export
from ckd_ray.pipeline.card import Facts, model_card
from ckd_ray.runs.artifact import is_finished, is_of
from ckd_ray.runs.directory import RunDir, check_role
from ckd_ray.runs.exports import check_place
from ckd_ray.runs.record import read_record
from ckd_ray.search.export import export_stored


def export(
    run: str,
    what: str,
    fmt: str,
    *,
    out: str | None = None,
    model: str = "student",
    width: int = 32,
    scores: str = "auto",
    bits: int = 4,
) -> dict[str, Any]:
    """Write the `model` of a run, its `labels`, or the `vectors` of its passages or an `index` of them.

    `export_run`, `export_labels` and `export_stored` say what the arguments mean, what is returned and what is raised.
    """
    if what == "model":
        return export_run(run, fmt, out=out, role=model)
    if what == "labels":
        return export_labels(run, fmt, out=out, width=width, scaling=scores)
    if what in ("vectors", "index"):
        return export_stored(run, what, fmt, out=out, system=model, bits=bits)
    raise UserError("unknown thing to export", where="--what", expected="model, labels, vectors or index", found=what)


def export_run(run: str, fmt: str, *, out: str | None = None, role: str = "student") -> dict[str, Any]:
    """Write the model of a run, or a checkpoint of ours, for the library of `fmt`.

    Args:
        run: a run directory (path or URI), or the folder of one checkpoint.
        out: the folder to write; `exports/FORMAT` inside the run (`exports/teacher-FORMAT`) when None.
        role: `student` or `teacher`.

    Returns:
        `out`, `format`, `model` (the checkpoint), `measures`, `differences`.

    Raises:
        UserError: no finished model there, the folder is in use, or the library cannot hold the model.
    """
    if fmt not in FORMATS:
        raise UserError("unknown format", where="--format", expected=", ".join(FORMATS), found=fmt)
    check_role(role, "--model", "model")
    run = run.rstrip("/")
    if exists(join(run, "colbert.json")):
        checkpoint, own, facts = run, with_ending(run, f"-{fmt}"), Facts(name=last_part(run))
    else:
        paths = RunDir(run)
        checkpoint = paths.checkpoint(role)
        own = join(paths.exports, fmt if role == "student" else f"teacher-{fmt}")
        _check_finished(run, checkpoint, role)
        facts = run_facts(paths, role)
    target = out or own
    check_place(target)
    with local_copy(checkpoint) as folder:
        model = ColBERT.from_pretrained(folder)
    with new_folder(target) as folder:
        notes = write_export(model, folder, fmt)
        (Path(folder) / "README.md").write_text(model_card(model.settings, facts, fmt, notes), encoding="utf-8")
    return {"out": target, "format": fmt, "model": checkpoint, "measures": facts.measures, "differences": notes}


def _check_finished(run: str, checkpoint: str, role: str) -> None:
    if not exists(run):
        raise UserError("there is no run", where=run, expected="a run directory (run.storage/run.name)")
    if not is_finished(checkpoint):
        raise UserError(
            f"the run has no finished {role}",
            where=checkpoint,
            expected="a run directory whose training has ended",
            fix="ckd-ray train finishes it",
        )


def _section(role: str) -> str:
    """The section of the configuration by which a model was trained."""
    return "distill" if role == "student" else "teacher"


def run_facts(run: RunDir, role: str, *, evaluating: bool = False) -> Facts:
    """What run.json and evaluation/ say about a run's model; what is not there is left out.

    Args:
        evaluating: this is the end of the evaluation itself, whose manifest is still to be written.
    """
    config = read_record(run.record).get("config", {}) if exists(run.record) else {}
    trained, section = join(run.checkpoint(role), "training.json"), _section(role)
    if exists(trained) and section in config:
        # run.json is of the last command, which may be training another student when this one is looked at; what a
        # student does not read is not in its training.json.
        settings = read_json(trained).get("settings", {})
        config = {**config, section: {key: value for key, value in settings.items() if key in config[section]}}
    # Measures count once the evaluation is finished: an older student's may lie there while a new one is measured.
    folder = run.evaluation
    path = join(folder, "measures.json")
    finished = is_finished(folder) and is_of(folder, "student", run.student)
    done = (evaluating or finished) and exists(path)
    splits = read_json(path).get("splits", {}) if done else {}
    measures = {split: systems[role] for split, systems in splits.items() if role in systems}
    queries = {}
    for split in measures:
        per_query = join(folder, f"{role}.{split}.per_query.json")
        if exists(per_query):
            queries[split] = max((len(values) for values in read_json(per_query).values()), default=0)
    name = str(config.get("run", {}).get("name") or last_part(run.folder))
    table = read_json(join(folder, TABLE)) if done and exists(join(folder, TABLE)) else {}
    return Facts(name=name, role=role, config=config, measures=measures, queries=queries, table=table)


def write_student_card(run: RunDir) -> None:
    """README.md beside the student's weights, at the end of the evaluation."""
    settings = ColBERTSettings.from_dict(read_json(join(run.student, "colbert.json")))
    text = model_card(settings, run_facts(run, "student", evaluating=True))
    write_atomic(join(run.student, "README.md"), lambda stream: stream.write(text.encode()))
