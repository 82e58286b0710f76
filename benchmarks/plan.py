"""How far a plan is from the run that follows it.

    python benchmarks/plan.py [--quick] [--data DIR] [--run DIR] [--rates FILE] [--save-rates FILE]

A job like the quick start (on `--data`, or the documentation of installed packages) is planned from a calibration, and
then run; `--run` compares with the manifests of a finished run instead, whose collection must be where run.json says.
`--rates` takes rates instead of measuring them.
plan_error: |predicted - measured| / measured of the seconds of all stages together; each stage is in `settings`.
What runs beside it while one of the two is measured, and not the other, counts as an error of the plan.
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
from ckd_ray.progress import set_quiet

GOAL = 0.25
_OPTIONS = {
    "run": {"metavar": "DIR", "help": "a finished run to compare with"},
    "rates": {"metavar": "FILE", "help": "rates of an earlier calibration"},
    "save_rates": {"metavar": "FILE", "help": "keep the measured rates"},
}


def main() -> None:
    args = arguments(__doc__ or "", **_OPTIONS)
    before = machine()
    set_quiet(True)
    with tempfile.TemporaryDirectory(prefix="ckd-ray-benchmark-") as storage:
        config = config_of(args.run) if args.run else small_job(storage, args.data, args.quick)
        planned = make_plan(config, rates=args.rates, keep=args.save_rates)
        note(render(planned))
        loads = [before["load"], machine()["load"]]
        if args.run:
            measured = seconds_of(Path(args.run), [stage.name for stage in planned.plan.stages])
        else:
            measured = run_job(config)
        loads.append(machine()["load"])
    predicted = {stage.name: stage.seconds for stage in planned.plan.stages}
    error, stages = compared(predicted, measured)
    for name, found in stages.items():
        note(f"{name}: {found['predicted']} s predicted, {found['measured']} s measured, error {found['error']}")
    settings: dict[str, Any] = {"quick": args.quick, "data": args.data, "run": args.run, "rates": args.rates}
    settings |= {"stages": stages, "predicted_seconds": round(sum(predicted.values()), 1)}
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


def seconds_of(run: Path, stages: list[str]) -> dict[str, float]:
    """What every stage took, from the manifests of the run."""
    from ckd_ray.pipeline.graph import STAGES
    from ckd_ray.runs.directory import RunDir

    found = {}
    for stage in STAGES:
        manifest = Path(stage.output(RunDir(str(run)))) / "manifest.json"
        if stage.name in stages and manifest.exists():
            found[stage.name] = float(json.loads(manifest.read_text())["seconds"])
    if not found:
        raise SystemExit(f"{run}: no finished stage here")
    return found


def small_job(storage: str, data: str | None, quick: bool) -> Config:
    """The quick start, or a third of it, in a folder of its own."""
    values = [f"run.storage={storage}", "run.name=plan"]
    if data:
        values += ["collection.format=msmarco", f"collection.path={data}", "collection.packages=null"]
        values += [f"collection.limit={1000 if quick else 'null'}"]
    if quick:
        values += ["teacher.steps=16", "distill.steps=24"]
        values += [] if data else ["collection.limit=900", "collection.packages=[numpy, pandas, pyarrow, pydantic]"]
    return load_config(None, values)


def run_job(config: Config) -> dict[str, float]:
    """Run it for real; seconds of every stage."""
    from ckd_ray.pipeline.runner import run_stages
    from ckd_ray.ray_util.session import connected

    note("running the job")
    with connected("local"):
        return {report.name: report.seconds for report in run_stages(config)}


if __name__ == "__main__":
    main()
