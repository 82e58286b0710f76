"""How far a plan is from the run that follows it.

    python benchmarks/plan.py [--quick] [--data DIR] [--limit N] [--run DIR] [--rates FILE] [--save-rates FILE]

The job of the quick start (on `--data`, or the documentation of installed packages) is planned from a calibration, and
then run. `--run` compares with the manifests of a finished run instead, whose collection must be where run.json says.
`--rates` takes rates instead of calibrating. `--limit` takes so many passages of `--data`, with queries that are
labelled with them.
plan_error: |predicted - measured| / measured of the seconds of all stages together; each stage is in `settings`.
Other work on the machine, while one of the two is measured and not the other, counts as an error of the plan.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, emit, figure, machine, note

from ckd_ray.checks import load_config
from ckd_ray.config import Config
from ckd_ray.plan.job import make_plan
from ckd_ray.plan.show import render
from ckd_ray.plan.work import FOLDERS
from ckd_ray.progress import set_quiet
from ckd_ray.runs.artifact import manifest_of

GOAL = 0.2
_OPTIONS: dict[str, dict[str, Any]] = {
    "limit": {"metavar": "N", "type": int, "help": "so many passages of --data"},
    "run": {"metavar": "DIR", "help": "a finished run to compare with"},
    "rates": {"metavar": "FILE", "help": "rates of an earlier calibration"},
    "save_rates": {"metavar": "FILE", "help": "keep the calibrated rates"},
}


def main() -> None:
    args = arguments(__doc__ or "", **_OPTIONS)
    before = machine()
    set_quiet(True)
    with tempfile.TemporaryDirectory(prefix="ckd-ray-benchmark-") as storage:
        config = config_of(args.run) if args.run else job(Path(storage), args.data, args.limit, args.quick)
        planned = make_plan(config, rates=args.rates, keep=args.save_rates)
        note(render(planned))
        loads = [before["load"], machine()["load"]]
        measured = seconds_of(Path(args.run)) if args.run else run_job(config)
        loads.append(machine()["load"])
    predicted = {stage.name: stage.seconds for stage in planned.plan.stages}
    error, stages = compared(predicted, measured)
    for name, found in stages.items():
        note(f"{name}: {found['predicted']} s predicted, {found['measured']} s measured, error {found['error']}")
    settings: dict[str, Any] = {"quick": args.quick, "data": args.data, "run": args.run, "rates": args.rates}
    settings |= {"limit": args.limit, "stages": stages, "predicted_seconds": round(sum(predicted.values()), 1)}
    settings |= {"measured_seconds": round(sum(measured.values()), 1), "calibration_seconds": planned.rates.seconds}
    settings |= {"loads": loads, "bound": planned.plan.bound.name, "slowest": max(measured, key=lambda n: measured[n])}
    emit(settings, {"plan_error": figure(error, GOAL, "lower")}, before)


def compared(predicted: dict[str, float], measured: dict[str, float]) -> tuple[float, dict[str, dict[str, float]]]:
    """The error of the whole, and predicted, measured and error (with its sign) of every stage."""
    stages = {
        name: {
            "predicted": round(predicted[name], 1),
            "measured": round(seconds, 1),
            "error": round((predicted[name] - seconds) / max(seconds, 1e-9), 3),
        }
        for name, seconds in measured.items()
    }
    whole = sum(measured.values())
    return abs(sum(predicted[name] for name in measured) - whole) / whole, stages


def config_of(run: str) -> Config:
    """The configuration of a finished run; keys that it did not know yet have their defaults."""
    return Config.model_validate(json.loads((Path(run) / "run.json").read_text())["config"])


def seconds_of(run: Path) -> dict[str, float]:
    """What every stage took, from the manifests of the run."""
    manifests = {stage: manifest_of(str(run / folders[0])) for stage, folders in FOLDERS.items()}
    found = {stage: float(manifest["seconds"]) for stage, manifest in manifests.items() if manifest is not None}
    if not found:
        raise SystemExit(f"{run}: no finished stage here")
    return found


def job(storage: Path, data: str | None, limit: int | None, quick: bool) -> Config:
    """The quick start, or a third of it, in a folder of its own."""
    values = [f"run.storage={storage}", "run.name=plan"]
    if data:
        path = cut(Path(data), storage / "data", limit or (1000 if quick else None))
        values += ["collection.format=msmarco", f"collection.path={path}", "collection.packages=null"]
        values += ["collection.limit=null"]
    elif quick:
        values += ["collection.limit=900", "collection.packages=[numpy, pandas, pyarrow, pydantic]"]
    if quick:
        values += ["teacher.steps=16", "distill.steps=24"]
    return load_config(None, values)


def cut(data: Path, out: Path, limit: int | None) -> Path:
    """The first `limit` passages of a folder in the MS MARCO layout, with the queries and labels that name them.
    (`collection.limit` keeps every labelled passage.)"""
    if limit is None:
        return data
    out.mkdir()
    passages = (data / "collection.tsv").read_text(encoding="utf-8").splitlines(keepends=True)[:limit]
    (out / "collection.tsv").write_text("".join(passages), encoding="utf-8")
    known = {line.split("\t", 1)[0] for line in passages}
    for split in ("train", "dev", "test"):
        labels = (data / f"qrels.{split}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        labels = [line for line in labels if line.split("\t")[2] in known]
        asked = {line.split("\t", 1)[0] for line in labels}
        queries = (data / f"queries.{split}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        queries = [line for line in queries if line.split("\t", 1)[0] in asked]
        (out / f"qrels.{split}.tsv").write_text("".join(labels), encoding="utf-8")
        (out / f"queries.{split}.tsv").write_text("".join(queries), encoding="utf-8")
    return out


def run_job(config: Config) -> dict[str, float]:
    """Run it for real; seconds of every stage."""
    from ckd_ray.ray_util.session import connected

    note("running the job")
    with connected("local"):
        from ckd_ray.pipeline.runner import run_stages

        return {report.name: report.seconds for report in run_stages(config)}


if __name__ == "__main__":
    main()
