"""The process in which the calibration runs the stages: `python -m ckd_ray.plan.sample_run TASK ANSWER`.

It imports Ray only where `connected` has set what Ray reads on import.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ckd_ray.config import Config
from ckd_ray.errors import UserError
from ckd_ray.ray_util.session import connected


def main(task: str, answer: str) -> None:
    """Bring up each run of the file `task`; write its stages and bytes, or the user's error, to the file `answer`."""
    found: Any = []
    try:
        with connected("local"):
            for entry in json.loads(Path(task).read_text(encoding="utf-8")):
                found.append(_bring_up(Config.model_validate(entry["config"]), entry["until"]))
    except UserError as error:
        found = {name: getattr(error, name) for name in ("problem", "where", "expected", "found", "fix")}
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


def _bring_up(config: Config, until: str) -> dict[str, Any]:
    from ckd_ray.pipeline.runner import run_stages

    stages = [
        {"stage": report.name, "seconds": report.seconds, "skipped": report.skipped}
        for report in run_stages(config, until=until)
    ]
    folders = [folder for folder in Path(config.run.storage, config.run.name).iterdir() if folder.is_dir()]
    stored = {folder.name: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in folders}
    return {"stages": stages, "bytes": stored}


if __name__ == "__main__":
    main(*sys.argv[1:])
