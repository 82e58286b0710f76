"""Copies results from the disk of the head into the local `runs/` folder."""

from __future__ import annotations

import json
from pathlib import Path

from ckd_ray.jobs import launcher as ray_launcher
from ckd_ray.jobs.bundle import HOME
from ckd_ray.jobs.launcher_file import LauncherFile
from ckd_ray.progress import say
from ckd_ray.streams import keep_log

# Names of folders end with a slash. Stores and checkpoints stay on the head.
_OF_A_RUN = ("run.json", "evaluation/", "student/")
RESULTS: dict[str, tuple[str, ...]] = {
    "train": _OF_A_RUN,
    "evaluate": _OF_A_RUN,
    "distill": ("run.json", "student/"),
    "compare": ("run.json", "compare/table.json", "compare/table.md"),
    "tune": ("run.json", "tune/"),
}
_NOTE = ".fetched"


def bring_home(launcher: LauncherFile, command: str, run: str) -> Path | None:
    """Fetch the results of `command` in the run `run` (storage/name, as in the job's configuration).

    Returns:
        the local folder: runs/NAME, or runs/NAME-CLUSTER where a local run has that name; None for remote storage.
    """
    if "://" in run:
        say(f"results: {run}")
        return None
    remote = run if run.startswith("/") else f"{HOME}/{run}"
    say(f"results: {remote} on the head of {launcher.prepared['cluster_name']}")
    wanted = RESULTS.get(command, ())
    if not wanted:
        return None
    local = local_folder(Path("runs"), run.rpartition("/")[2], str(launcher.prepared["cluster_name"]))
    local.mkdir(parents=True, exist_ok=True)
    (local / _NOTE).write_text(json.dumps({"cluster": launcher.prepared["cluster_name"], "run": remote}) + "\n")
    fetched = [name for name in wanted if ray_launcher.fetch(launcher, f"{remote}/{name}", local / name)]
    say(f"fetched {', '.join(fetched) or 'nothing'} -> {local}")
    missing = [name for name in wanted if name not in fetched]
    if missing:  # after --until an earlier stage, say
        say(f"missing or out of reach: {', '.join(missing)} (log: {keep_log()})")
    return local


def local_folder(base: Path, name: str, cluster: str) -> Path:
    """`base/name`, unless a run of this machine is there."""
    local = base / name
    taken = local.exists() and not (local / _NOTE).exists()
    return base / f"{name}-{cluster}" if taken else local
