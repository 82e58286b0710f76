"""Is the student better than what people already have? Several comparisons, each of another teacher, taken together.

    for s in 1 2 3; do ckd-ray compare --config configs/medquad.yaml --set run.seed=$s --set run.name=effect-$s; done
    python benchmarks/effect.py runs/effect-1 runs/effect-2 runs/effect-3 [--grades dev=FILE] [--system collective]

Reads the TREC runs of every system of every comparison: encoder as it is, BM25, teacher, and one student an objective
and seed. All students of one teacher share its luck, so a difference is the mean over the teachers, tested over the
queries (paired randomisation), with Holm's correction over the comparisons of one figure. `--grades SPLIT=FILE` adds
nDCG@10 of a split's queries under other labels (the four columns of qrels). Prints JSON, and a table in Markdown on
standard error. Shapes: R comparisons, N queries.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from common import machine, note

from ckd_ray.data import Collection
from ckd_ray.evaluate.measures import measure_run
from ckd_ray.evaluate.runs import read_trec_run
from ckd_ray.evaluate.significance import bootstrap_interval, holm, paired_difference
from ckd_ray.files import read_json
from ckd_ray.runs.artifact import is_finished

MEASURES = {"dev": ["MRR@10"], "test": ["nDCG@10", "R@100"]}
GRADED = "nDCG@10"
Array = npt.NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories with a finished comparison")
    parser.add_argument("--grades", action="append", default=[], metavar="SPLIT=FILE")
    parser.add_argument("--system", default="collective", help="what the others are compared with")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=RUN",
        help="another library's student: a run directory whose teacher is its checkpoint (benchmarks/peers.py)",
    )  # fmt: skip
    args = parser.parse_args()
    grades = dict(item.split("=", 1) for item in args.grades)
    runs = [Path(run) for run in args.runs]
    systems = sorted({name for run in runs for name in systems_of(run)})
    values = {name: measured(runs, name, grades) for name in systems}
    for item in args.peer:
        name, folder = item.split("=", 1)
        values.setdefault(name, {})
        for figure, found in measured([Path(folder)], "teacher", grades).items():
            values[name][figure] = np.concatenate([values[name].get(figure, found[:0]), found])
    table = compared(values, args.system)
    note(markdown(table, args.system, len(runs)))
    settings = {"runs": [run.name for run in runs], "system": args.system, "budget": budget(runs[0])}
    print(json.dumps({"machine": machine(), "settings": settings, "figures": table}), file=sys.stdout)


def systems_of(run: Path) -> dict[str, list[Path]]:
    """The folders with the TREC runs of every system of a comparison, one a seed; what is not finished is left out."""
    folders = [("teacher", run / "compare" / "teacher")]
    folders += [(name, run / "baselines" / name) for name in ("encoder", "bm25")]
    folders += [(f.parent.name.rpartition("-")[0], f) for f in sorted((run / "compare").glob("*-*/evaluation"))]
    found: dict[str, list[Path]] = {}
    for name, folder in folders:
        if is_finished(str(folder)):
            found.setdefault(name, []).append(folder)
    return found


def measured(runs: list[Path], system: str, grades: dict[str, str]) -> dict[str, Array]:
    """figure -> (R, N): the values of every query, the mean over the seeds of a comparison."""
    found: dict[str, list[Array]] = {}
    for run in (run for run in runs if system in systems_of(run)):  # one measurement of a baseline serves all runs
        for figure, values in _of_run(run, system, grades):
            found.setdefault(figure, []).append(values)
    return {figure: np.stack(rows) for figure, rows in found.items()}


def _of_run(run: Path, system: str, grades: dict[str, str]) -> Iterator[tuple[str, Array]]:
    collection = Collection.open(str(run))
    folders = systems_of(run)[system]
    name = system if system in ("encoder", "bm25", "teacher") else "student"
    for split, measures in MEASURES.items():
        if split not in collection.splits:
            continue
        labels = collection.qrels(split)
        qrels = pd.DataFrame(
            {"query_id": labels.query_ids, "doc_id": labels.passage_ids, "relevance": labels.relevance}
        )
        wanted = [(f"{split} {measure}", measure, qrels) for measure in measures]
        if split in grades:
            rows = [line.split() for line in Path(grades[split]).read_text().splitlines() if line.strip()]
            graded = pd.DataFrame(
                {
                    "query_id": [r[0] for r in rows],
                    "doc_id": [r[2] for r in rows],
                    "relevance": [int(r[3]) for r in rows],
                }
            )
            wanted.append((f"{split} graded {GRADED}", GRADED, graded))
        ranked = [read_trec_run(str(folder / f"{name}.{split}.run")) for folder in folders]
        for figure, measure, labelled in wanted:
            by_seed = [measure_run(one, labelled, [measure]).per_query[measure] for one in ranked]
            yield figure, np.mean([[one[q] for q in by_seed[0]] for one in by_seed], axis=0)


def compared(values: dict[str, dict[str, Array]], system: str) -> dict[str, Any]:
    """figure -> system -> mean, interval, and the difference of `system` from it."""
    table: dict[str, Any] = {}
    for figure, own_RN in values[system].items():
        others = [name for name in values if name != system and figure in values[name]]
        table[figure] = {
            name: {
                "mean": float(values[name][figure].mean()),
                "interval": bootstrap_interval(values[name][figure]),
                "by_run": [float(v) for v in values[name][figure].mean(1)],
            }
            for name in [*others, system]
        }
        found = {name: _difference(values[name][figure], own_RN) for name in others}
        for name, p in zip(others, holm([found[name].p for name in others]), strict=True):
            d = found[name]
            table[figure][name] |= {"difference": d.mean, "low": d.low, "high": d.high, "p": d.p, "p_holm": p}
    return table


def _difference(other_RN: Array, own_RN: Array) -> Any:
    if len(other_RN) != len(own_RN):  # a peer was trained with another number of seeds
        other_RN, own_RN = other_RN.mean(0, keepdims=True), own_RN.mean(0, keepdims=True)
    return paired_difference(other_RN, own_RN)


def budget(run: Path) -> dict[str, Any]:
    """What every student of a comparison had."""
    d = read_json(str(run / "run.json"))["config"]["distill"]
    found = {
        key: d[key] for key in ("steps", "batch_size", "negatives", "learning_rate", "sampling", "negatives_depth")
    }
    return {**found, "passages_encoded": d["steps"] * d["batch_size"] * (1 + d["negatives"])}


def markdown(table: dict[str, Any], system: str, runs: int) -> str:
    """One row a system: its mean, and how far `system` is from it."""
    figures = list(table)
    lines = [f"| system | {' | '.join(figures)} |", "|---" * (len(figures) + 1) + "|"]
    for name in table[figures[0]]:
        cells = []
        for figure in figures:
            cell = table[figure].get(name)
            text = "" if cell is None else f"{cell['mean']:.4f}"
            if cell and "difference" in cell:
                text += f" ({cell['difference']:+.4f}, p {cell['p_holm']:.4f})"
            cells.append(text)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"\nMeans over {runs} teachers. In brackets: {system} minus the system, p with Holm's correction.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
