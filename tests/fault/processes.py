"""The processes below a command, read from /proc: which there are, and sending them signals."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Titles that Ray gives to the processes of our actors; every other worker is a task, an idle one, or Ray's own.
ACTORS = ("ShardEncoder", "ShardServer", "RayTrainWorker", "PartScorer")


@dataclass(frozen=True)
class Process:
    """A process: its number and its command line (of Ray's workers, the title)."""

    pid: int
    title: str

    @property
    def role(self) -> str:
        """`actor`, `worker`, `raylet`, `gcs`, or `other`."""
        if self.title.startswith("ray::"):
            return "actor" if any(name in self.title for name in ACTORS) else "worker"
        program = os.path.basename(self.title.split()[0]) if self.title.split() else ""
        return {"raylet": "raylet", "gcs_server": "gcs"}.get(program, "other")


def below(root: int) -> list[Process]:
    """Every process that descends from `root`, which is not among them."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            waiting.append(child)
            with suppress(OSError):
                title = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(Process(child, title.strip()))
    return found


def choose(root: int, role: str, rng: random.Random) -> Process | None:
    """One of the processes of that role below `root`, or none."""
    mine = sorted((p for p in below(root) if p.role == role), key=lambda p: p.pid)
    return rng.choice(mine) if mine else None


def end_all(root: int, family: dict[int, str]) -> None:
    """Kill `root` and what it has started: `family`, by number and title, since what a dead process leaves has another
    parent. A number that another process has by now is left alone."""
    for pid in family:
        with suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            same_kind = title.startswith("ray::") and family[pid].startswith("ray::")  # titles change with the task
            if title and (title == family[pid] or same_kind):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(root, signal.SIGCONT)
        os.kill(root, signal.SIGKILL)
