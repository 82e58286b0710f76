"""What a search saves against as many whole pipelines, by stopping weak trials and by sharing what is upstream.

    python benchmarks/tune.py [--quick] [--data DIR] [--run DIR]

`--run` reads the figures of a finished search; without it one is run. `--quick`: four short trials on 600 passages.
trials_saved_share: 1 less the seconds of the search (everything upstream once, and its trials) over those of one whole
pipeline a trial, with all steps at the rate of the finished trials. The winner's full training counts in neither.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, emit, figure, machine, note


def main() -> None:
    args = arguments(__doc__ or "", run={"metavar": "DIR", "help": "a run with a finished search"})
    before = machine()
    summary = json.loads((Path(args.run) / "tune" / "summary.json").read_text()) if args.run else searched(args)
    saved, trials = summary["saved"], summary["trials"]
    settings: dict[str, Any] = {"quick": args.quick, "data": args.data, "run": args.run, **saved}
    settings |= {"trials": len(trials), "stopped": sum(t["state"] == "stopped" for t in trials)}
    settings |= {"best": summary["best"], "agreement": summary["agreement"]}
    emit(settings, {"trials_saved_share": figure(saved["share"], None, "higher")}, before)


def searched(args: Any) -> dict[str, Any]:
    """The summary of a new search: `configs/tune.yaml` in a temporary folder, on `--data` or the documentation."""
    from ckd_ray.checks import load_config
    from ckd_ray.progress import set_quiet
    from ckd_ray.ray_util.session import connected
    from ckd_ray.tune.job import run_tune

    values = [f"run.storage={tempfile.mkdtemp(prefix='ckd-ray-benchmark-')}"]
    if args.data:
        values.append(f"collection.path={args.data}")
    else:
        values.append("collection={format: docstrings, path: null}")
    if args.quick:
        values += ["collection.limit=600", "teacher.steps=10", "distill.steps=12", "tune.trials=4", "tune.grace=1"]
        values += ["tune.measurements=3", "tune.dev_queries=50", "tune.dev_passages=200", "tune.label_candidates=4"]
        values += ["tune.label_kept=2", "evaluate.depth=100", "evaluate.measures=[MRR@10]"]
    note("searching")
    set_quiet(True)
    with connected("local"):
        return run_tune(load_config(str(Path(__file__).parents[1] / "configs" / "tune.yaml"), values))


if __name__ == "__main__":
    main()
