"""The processes below a command, read from /proc: which there are, and sending them signals."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.fast_start.starter import parent_and_start, parents

# Ray's own servants of a node, with whose end the raylet ends as well.
_AGENTS = ("DashboardAgent", "RuntimeEnvAgent")
# Titles that Ray gives to the processes of our actors; every other worker is a task, an idle one, or Ray's own.
ACTORS = ("ShardEncoder", "ShardServer", "RayTrainWorker", "PartScorer")


@dataclass(frozen=True)
class Process:
    """A process: its number, when it was started (in ticks since the boot: with the number, never used again), and its
    command line (of Ray's workers, the title)."""

    pid: int
    started: int
    title: str

    @property
    def role(self) -> str:
        """`actor`, `worker`, `raylet`, `gcs`, or `other`."""
        if any(name in self.title for name in _AGENTS):
            return "other"
        if self.title.startswith("ray::"):
            return "actor" if any(name in self.title for name in ACTORS) else "worker"
        program = os.path.basename(self.title.split()[0]) if self.title.split() else ""
        return {"raylet": "raylet", "gcs_server": "gcs"}.get(program, "other")


def below(root: int) -> list[Process]:
    """Every process that descends from `root`, which is not among them."""
    children, raylets = dict[int, list[tuple[int, int]]](), parents()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, ValueError, IndexError):
                parent, started = parent_and_start(int(entry.name))
                parent = raylets.get((int(entry.name), started), parent)
                children.setdefault(parent, []).append((int(entry.name), started))
    found, waiting = [], [root]
    while waiting:
        for child, started in children.get(waiting.pop(), []):
            waiting.append(child)
            with suppress(OSError):
                title = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(Process(child, started, title.strip()))
    return found


def inside(first: int) -> list[Process]:
    """Every process of the namespace whose first process is `first`, zombies excepted."""
    found, space = [], os.readlink(f"/proc/{first}/ns/pid")
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, ValueError, IndexError):
                if os.readlink(entry / "ns" / "pid") == space:
                    title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if title:
                        found.append(Process(int(entry.name), parent_and_start(int(entry.name))[1], title))
    return found


def choose(root: int, role: str, rng: random.Random) -> Process | None:
    """One of the processes of that role below `root`, or none."""
    return choose_of(below(root), role, rng)


def choose_of(processes: list[Process], role: str, rng: random.Random) -> Process | None:
    """One of the processes of that role, or none."""
    mine = sorted((p for p in processes if p.role == role), key=lambda p: p.pid)
    return rng.choice(mine) if mine else None


def end_all(family: dict[int, int]) -> None:
    """Kill what a command has started: processes by number and start. What a dead process leaves has another parent; a
    number that another process has by now is left alone."""
    for pid, started in family.items():
        with suppress(OSError, IndexError, ValueError):
            if parent_and_start(pid)[1] == started:
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
