"""Runs the whole job on a tiny collection again and again, breaks something at a random moment of every stage, and
compares what comes out with an undisturbed run.

    python -m tests.fault.soak --faults 200 --seed 1 --out tests/fault/faults.json

A command that stops must say why in one message, without a traceback, and must complete when it is given again. Needs
Linux, and root for the kinds that mount a small tmpfs (they are left out otherwise). `--minutes` ends it earlier.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from tests.fault.processes import below, choose, end_all
from tests.fault.soak_table import rows
from tests.fault.soaking import (
    HUNG,
    SETTINGS,
    SIZE,
    STAGES,
    Command,
    Fault,
    cut_address_space,
    digests,
    inject,
    judge_stop,
    plan,
)
from tests.support import flip_bit, overrides, tiny_bert, write_collection

READ_ONLY = "read-only"
ALTERED = "file of a finished stage: one bit"
_TIMEOUT_S = 1200.0
_STOP_S, _LONG_STOP_S = 5.0, 60.0


class Soak:
    """All runs of one soak, in `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.backbone = tiny_bert(folder / "encoder")
        self.collection = str(write_collection(folder / "collection", **SIZE))
        self.faults: list[Fault] = []
        self.usual: dict[str, float] = {}
        self.expected: dict[str, str] = {}
        self.mounted: set[Path] = set()
        self.can_mount = os.getuid() == 0 and self._mounts()
        self.donor: Path | None = None

    def _mounts(self) -> bool:
        probe = self.folder / "probe"
        probe.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(probe)], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", str(probe)], check=True)
        return done.returncode == 0

    # -- one command -----------------------------------------------------------------------------------------------

    def start(self, storage: Path) -> Command:
        """`ckd-ray train` on its own Ray, in a session of its own."""
        values = overrides(storage, self.backbone, self.collection, *SETTINGS)
        sets = [part for value in values for part in ("--set", value)]
        hidden = ("RAY_ADDRESS", "CKD_RAY_TRACEBACK")
        environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"TMPDIR": str(self.folder / "tmp")}
        line = [sys.executable, "-m", "tests.fault.soak_command", "train", "--cluster", "local", *sets]
        return Command.begin(line, environment)

    def wait(self, command: Command) -> int:
        """Its exit status; `HUNG` when it did not end, and was ended."""
        try:
            code = command.process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = HUNG
        if command.process.poll() is None:
            command.family |= {p.pid: p.started for p in below(command.process.pid)}
            os.kill(command.process.pid, signal.SIGKILL)
            command.process.wait()
        end_all(command.family)
        return code

    # -- what is compared ------------------------------------------------------------------------------------------

    def undisturbed(self, times: int) -> None:
        """The run that all others must be equal to; made twice, to be sure that equality may be asked for."""
        for name in ("undisturbed", "again")[:times]:
            command = self.start(self.folder / name)
            code = self.wait(command)
            if code != 0:
                raise SystemExit("the undisturbed run failed:\n" + "\n".join(command.lines[-20:]))
            found = digests(self.folder / name / "tiny")
            if self.expected and found != self.expected:
                raise SystemExit(f"two undisturbed runs differ: {[k for k in found if found[k] != self.expected[k]]}")
            self.expected, self.usual = found, command.spent
        self.donor = self.folder / name / "tiny"
        print(f"undisturbed: {', '.join(f'{k} {v:.1f} s' for k, v in self.usual.items())}", flush=True)

    # -- one run ---------------------------------------------------------------------------------------------------

    def run(self, number: int, plan: dict[str, list[str]]) -> list[Fault]:
        """One run with the faults of `plan` (stage -> kinds); what became of them."""
        storage = self.folder / f"run-{number:03d}"
        storage.mkdir()
        if self.can_mount:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(storage)], check=True)
            self.mounted.add(storage)
        left, mine, spent = {k: list(v) for k, v in plan.items()}, list[Fault](), Counter[str]()
        trouble, unstarted, log = "", 0, list[str]()
        if storage in self.mounted and number % 3 == 0:
            mine.append(self._read_only(storage, number))
            trouble = mine[0].cause if mine[0].outcome == "" else ""
        for attempt in range(8 + 3 * sum(map(len, plan.values())) + 2):
            before = len(mine)
            command = self.start(storage)
            injector = threading.Thread(target=self._inject, args=(command, storage, left, mine, number))
            injector.start()
            code = self.wait(command)
            injector.join()
            self._make_good(storage)
            spent.update(command.spent)
            log += [*command.lines, f"=== exit status {code}"]
            if code == 0:
                break
            if any(line.startswith("ckd-ray: Ray did not start here") for line in command.lines):
                unstarted += 1  # on a machine this busy Ray gives itself up while it starts; no fault of ours was met
                if unstarted <= 8:
                    continue
            trouble = trouble or judge_stop(code, command.lines, mine, before, self.folder)
            if attempt > len(mine) + 1 + unstarted:
                trouble = trouble or f"does not complete when run again: {command.lines[-3:]}"
                break
            if not any(fault.kind == ALTERED for fault in mine):
                mine += self._alter(storage, number)
        if code == 0 and not trouble:
            wrong = [k for k, v in digests(storage / "tiny").items() if v != self.expected[k]]
            trouble = f"differs from the undisturbed run: {', '.join(wrong)}" if wrong else ""
        for fault in mine:
            fault.outcome = f"FAILED: {trouble}" if trouble else fault.outcome or "went on"
            fault.extra = round(max(0.0, spent[fault.stage] - self.usual.get(fault.stage, 0.0)), 1)
        (self.folder / f"lines-{number:03d}.log").write_text("\n".join(log))
        if trouble:
            (self.folder / f"failed-{number:03d}.log").write_text("\n".join(command.lines))
        else:
            self._remove(storage)
        return mine

    def _read_only(self, storage: Path, number: int) -> Fault:
        """A command on a run directory that cannot be written. (While a command runs its lock is open for writing, and
        the system refuses to mount the disk again without writing.)"""
        subprocess.run(["mount", "-o", "remount,ro", str(storage)], check=True)
        command = self.start(storage)
        code = self.wait(command)
        self._make_good(storage)
        fault = Fault(READ_ONLY, "collection", number, 0.0, "the run's disk")
        trouble = judge_stop(code, command.lines, [fault], 0, self.folder)
        if code != 2 or trouble:
            fault.outcome, fault.cause = "", trouble or f"exit status {code}"
        return fault

    def _alter(self, storage: Path, number: int) -> list[Fault]:
        """While no command runs: one bit of a file that a finished stage has written, outside of stores."""
        folders = {"corpus": "collection", "queries": "collection", "teacher": "teacher", "rankings": "retrieve"}
        folders |= {"labels": "label", "student": "distill"}
        finished = [storage / "tiny" / f for f in folders if (storage / "tiny" / f / "_manifest.json").exists()]
        found = [
            p for f in finished for p in f.rglob("*") if p.name != "_manifest.json" and p.is_file() and p.stat().st_size
        ]
        if not found or (storage / "tiny" / "evaluation" / "_manifest.json").exists():
            return []  # when all is done, no stage reads what those before it have written
        path = self.rng.choice(sorted(found))
        at = self.rng.randrange(path.stat().st_size)
        flip_bit(path, at, self.rng.randrange(8))
        print(f"  run {number}: {ALTERED}: {path.relative_to(storage)} byte {at}", flush=True)
        stage = folders[path.relative_to(storage / "tiny").parts[0]]
        return [Fault(ALTERED, stage, number, 0.0, f"{path.relative_to(storage)} byte {at}")]

    def _remove(self, storage: Path) -> None:
        if storage in self.mounted:
            subprocess.run(["umount", "-l", str(storage)], check=False)
            self.mounted.discard(storage)
        shutil.rmtree(storage, ignore_errors=True)

    # -- faults ----------------------------------------------------------------------------------------------------

    def _inject(
        self, command: Command, storage: Path, left: dict[str, list[str]], mine: list[Fault], number: int
    ) -> None:
        def act(kind: str) -> str:
            command.family |= {p.pid: p.started for p in below(command.process.pid)}
            return KINDS[kind](self, command, storage)

        inject(command, left, mine, number, usual=self.usual, rng=self.rng, act=act)

    def _make_good(self, storage: Path) -> None:
        """What an operator would do before giving the command again: make room, make it writable."""
        if storage in self.mounted:
            subprocess.run(["mount", "-o", "remount,rw", str(storage)], check=True)
        for ballast in storage.glob("ballast-*"):
            ballast.unlink()


def _kill(role: str) -> Callable[[Soak, Command, Path], str]:
    def act(soak: Soak, command: Command, storage: Path) -> str:
        if role == "driver":
            os.kill(command.process.pid, signal.SIGKILL)
            return "the driver"
        target = choose(command.process.pid, role, soak.rng)
        if target is None:
            return ""
        with suppress(ProcessLookupError):
            os.kill(target.pid, signal.SIGKILL)
        return target.title[:60]

    return act


def _stop(role: str, seconds: float) -> Callable[[Soak, Command, Path], str]:
    def act(soak: Soak, command: Command, storage: Path) -> str:
        if role == "driver":
            pid, title = command.process.pid, "the driver"
        else:
            target = choose(command.process.pid, role, soak.rng)
            if target is None:
                return ""
            pid, title = target.pid, target.title[:60]
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(pid, signal.SIGCONT)
        return f"{title} for {seconds:.0f} s"

    return act


def _full(soak: Soak, command: Command, storage: Path) -> str:
    """Fill the run's disk to the last byte."""
    with suppress(OSError), open(storage / f"ballast-{time.monotonic_ns()}", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with suppress(OSError), open(storage / f"ballast-{time.monotonic_ns()}", "wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    return "the run's disk"


def _shards(storage: Path) -> list[Path]:
    return sorted(p for p in storage.glob("tiny/*embeddings/*/*.arrow") if p.stat().st_size > 100)


def _flip(soak: Soak, command: Command, storage: Path) -> str:
    shards = _shards(storage)
    if not shards:
        return ""
    path = soak.rng.choice(shards)
    with suppress(FileNotFoundError):
        at = soak.rng.randrange(path.stat().st_size)
        flip_bit(path, at, soak.rng.randrange(8))
        return f"{path.relative_to(storage)} byte {at}"
    return ""


def _truncate(soak: Soak, command: Command, storage: Path) -> str:
    """Cut off in a copy that takes its place: cutting a mapped file ends its readers by SIGBUS, whatever they do."""
    shards = _shards(storage)
    if not shards:
        return ""
    path = soak.rng.choice(shards)
    with suppress(OSError):
        data = path.read_bytes()
        cut = path.with_name(f"{path.name}.cut")
        cut.write_bytes(data[: soak.rng.randrange(len(data))])
        os.replace(cut, path)
        return f"{path.relative_to(storage)} of {len(data)} bytes"
    return ""


def _foreign(soak: Soak, command: Command, storage: Path) -> str:
    """A shard of another run of other settings, whole in itself, in the place of one of ours."""
    shards = _shards(storage)
    if not shards or soak.donor is None:
        return ""
    path = soak.rng.choice(shards)
    others = sorted(p for p in soak.donor.glob("*embeddings/*/*.arrow") if p.name != path.name)
    with suppress(OSError):
        aside = path.with_name(f"{path.name}.other")
        shutil.copy(soak.rng.choice(others), aside)
        os.replace(aside, path)
        return str(path.relative_to(storage))
    return ""


def _clock(soak: Soak, command: Command, storage: Path) -> str:
    with suppress(ProcessLookupError):
        os.kill(command.process.pid, signal.SIGUSR1)
    return "time.time() of the driver, by a day"


def _no_memory(soak: Soak, command: Command, storage: Path) -> str:
    """No more address space for an actor than it has at this moment: the next large allocation fails."""
    target = choose(command.process.pid, "actor", soak.rng)
    if target is None:
        return ""
    with suppress(OSError, ProcessLookupError, ValueError):
        cut_address_space(target.pid)
        return target.title[:60]
    return ""


KINDS: dict[str, Callable[[Soak, Command, Path], str]] = {
    "kill actor": _kill("actor"),
    "kill worker": _kill("worker"),
    "kill raylet": _kill("raylet"),
    "kill driver": _kill("driver"),
    "stop actor": _stop("actor", _STOP_S),
    "stop worker": _stop("worker", _STOP_S),
    "stop raylet": _stop("raylet", _STOP_S),
    "stop driver": _stop("driver", _STOP_S),
    "stop actor for a minute": _stop("actor", _LONG_STOP_S),
    "disk full": _full,
    "shard: one bit": _flip,
    "shard: cut off": _truncate,
    "shard: of another run": _foreign,
    "clock jumps a day": _clock,
    "no memory for an actor": _no_memory,
}
_MOUNTING = {"disk full"}
_ACTORS = {"kill actor", "stop actor", "stop actor for a minute", "no memory for an actor"}
_SHARDS = {"shard: one bit", "shard: cut off", "shard: of another run"}
# In which stages a kind can be met: actors encode, search and train; shards are there once the corpus is embedded.
_NOT_IN: dict[str, set[str]] = {
    **{kind: {"collection"} for kind in _ACTORS},
    **{kind: {"collection", "teacher"} for kind in _SHARDS},
}
_ENDING = {"kill driver", "kill raylet", "disk full"}
_SELDOM = {"stop actor for a minute": 3}


def main() -> None:
    """Inject `--faults` faults, and write what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", required=True)
    parser.add_argument("--each", type=int, default=2, help="faults a stage and run")
    parser.add_argument("--once", action="store_true", help="make one undisturbed run, not two that are compared")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--kinds", help="only these, separated by commas")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the runs")
    arguments = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="ckd-soak-"))
    (folder / "tmp").mkdir()
    soak = Soak(folder, arguments.seed)
    kinds = [k for k in KINDS if soak.can_mount or k not in _MOUNTING]
    if arguments.kinds:
        kinds = [k for k in kinds if k in arguments.kinds.split(",")]
    soak.undisturbed(1 if arguments.once else 2)
    number = 0
    while len(soak.faults) < arguments.faults and time.monotonic() - began < 60 * arguments.minutes:
        chosen = plan(soak.rng, soak.faults, kinds, arguments.each, not_in=_NOT_IN, ending=_ENDING, seldom=_SELDOM)
        soak.faults += soak.run(number, chosen)
        number += 1
        write(Path(arguments.out), soak, arguments, number, time.monotonic() - began)
    failed = [f for f in soak.faults if f.outcome.startswith("FAILED")]
    print(f"{len(soak.faults)} faults in {number} runs, {len(failed)} failed", flush=True)
    for storage in list(soak.mounted):
        soak._remove(storage)
    if not arguments.keep and not failed:
        shutil.rmtree(folder, ignore_errors=True)


def write(out: Path, soak: Soak, arguments: argparse.Namespace, runs: int, seconds: float) -> None:
    """The record so far."""
    record = {
        "command": f"python -m tests.fault.soak {' '.join(sys.argv[1:])}",
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]},
        "stop_seconds": [_STOP_S, _LONG_STOP_S],
        "runs": runs,
        "seconds": round(seconds, 1),
        "undisturbed_seconds": {k: round(v, 1) for k, v in soak.usual.items()},
        "injected": len(soak.faults),
        "failed": sum(f.outcome.startswith("FAILED") for f in soak.faults),
        "table": rows([asdict(f) for f in soak.faults], [*KINDS, READ_ONLY, ALTERED], list(STAGES)),
        "faults": [asdict(f) for f in soak.faults],
    }
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
