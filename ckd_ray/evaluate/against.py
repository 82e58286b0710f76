"""Compare any two runs on the same queries (`ckd-ray evaluate --against RUN`)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from ckd_ray.errors import UserError
from ckd_ray.evaluate.paired import compare_values, render, same_queries
from ckd_ray.files import exists, join, list_files, read_object, write_json_atomic
from ckd_ray.progress import without_keys
from ckd_ray.runs.finished import FinishedRun, reading

# Settings that change the meaning of the values, and settings that may change it.
_MUST_AGREE = ("relevance_threshold", "skip_same_id")
_SHOULD_AGREE = ("depth", "engine", "collection")


@dataclass(frozen=True)
class Side:
    """One system of an evaluated run; `per_query` maps split -> measure -> query id -> value."""

    run: FinishedRun
    system: str
    settings: dict[str, Any]
    per_query: dict[str, dict[str, dict[str, float]]]

    @classmethod
    def of(cls, run: FinishedRun, system: str) -> Side:
        """Read the files of the evaluate stage.

        Raises:
            UserError: this system of the run was not evaluated.
        """
        folder = run.paths.evaluation
        ending = ".per_query.json"
        names = [n for n in list_files(folder, ending) if n.startswith(f"{system}.")]
        if not exists(join(folder, "measures.json")) or not names:
            raise UserError(
                f"no evaluation of a {system} here",
                where=run.paths.folder,
                expected=f"evaluation/{system}.SPLIT{ending}",
                fix="run ckd-ray evaluate with the configuration of that run",
            )
        with reading(run.paths.folder):
            splits = {n.removeprefix(f"{system}.").removesuffix(ending): read_object(join(folder, n)) for n in names}
            values = {
                split: {m: {query: float(v) for query, v in found.items()} for m, found in measures.items()}
                for split, measures in splits.items()
            }
            settings = dict(read_object(join(folder, "measures.json")).get("settings", {}))
        return cls(run, system, settings, values)


def compare_runs(other: Side, mine: Side) -> dict[str, Any]:
    """The paired test between `mine` and `other` on every common split, written into the `evaluation/` of `mine`.

    Raises:
        UserError: no split or measure in common, different queries, or settings under which values are not comparable.
    """
    for key in _MUST_AGREE:
        if key in other.settings and key in mine.settings and other.settings[key] != mine.settings[key]:
            raise UserError(
                "the two runs were evaluated with different settings",
                where=f"evaluate.{key}",
                expected=f"{mine.settings[key]}, as here",
                found=f"{other.settings[key]} in {other.run.paths.folder}",
                fix="evaluate both with the same value",
            )
    splits = [split for split in mine.per_query if split in other.per_query]
    if not splits:
        raise UserError(
            "the two runs have no evaluated split in common",
            where="--against",
            expected=f"one of {', '.join(mine.per_query)}",
            found=", ".join(other.per_query),
        )
    notes = [
        "the collections differ, though the query ids are the same"
        if key == "collection"
        else f"evaluate.{key} differs: {mine.settings.get(key)} here, {other.settings.get(key)} there"
        for key in _SHOULD_AGREE
        if other.settings.get(key) != mine.settings.get(key)
    ]
    tables = {}
    for split in splits:
        same_queries(mine.per_query[split], other.per_query[split], f"--against {other.run.paths.folder} ({split})")
        tables[split] = compare_values(other.per_query[split], mine.per_query[split], ("there", "here"))
        lacking = sorted(set(mine.per_query[split]) ^ set(other.per_query[split]))
        if lacking:
            notes.append(f"{split}: measured in one of the runs only, so left out: {', '.join(lacking)}")
    if not any(tables.values()):
        raise UserError("the two runs have no measure in common", where="evaluate.measures")
    found = {
        "here": {"run": mine.run.paths.folder, "system": mine.system},
        "there": {"run": other.run.paths.folder, "system": other.system},
        "notes": notes,
        "splits": tables,
    }
    # The digest tells runs of the same name apart.
    digest = hashlib.sha256(f"{mine.system} {other.run.paths.folder} {other.system}".encode()).hexdigest()[:8]
    file = join(mine.run.paths.evaluation, f"against-{other.run.name.replace('/', '-')}-{digest}.json")
    write_json_atomic(file, without_keys(found))
    return {**found, "written": file}


def render_against(found: dict[str, Any]) -> str:
    """Plain text: the two systems, notes, the tables, and the file that holds them."""
    lines = [f"{name}: {found[name]['system']} of {found[name]['run']}" for name in ("here", "there")]
    lines += [f"note: {note}" for note in found["notes"]]
    return "\n".join([*lines, render(found["splits"], ("there", "here")), found["written"]])
