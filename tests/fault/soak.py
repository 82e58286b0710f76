"""Runs the whole job on a tiny collection again and again, breaks something at a random moment of every stage, and
compares what comes out with an undisturbed run.

    python -m tests.fault.soak --faults 200 --seed 1 --out tests/fault/faults.json

A command that stops must say why in one message, without a traceback, and must complete when it is given again. Needs
Linux, and root for the kinds that mount a small tmpfs (they are left out otherwise). `--minutes` ends it earlier.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import resource
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
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fault.processes import below, choose, end_all
from tests.fault.soak_table import rows
from tests.support import flip_bit, overrides, tiny_bert, write_collection

STAGES = ("collection", "teacher", "embed", "retrieve", "label", "distill", "evaluate")
READ_ONLY = "read-only"
ALTERED = "file of a finished stage: one bit"
_TIMEOUT_S = 1200.0
_STOP_S, _LONG_STOP_S = 5.0, 60.0


@dataclass
class Fault:
    """One fault that was injected, and what became of it.

    Attributes:
        moment: seconds after the stage began. hit: the process or file.
        outcome: `went on`, `stopped, completed when run again`, or `FAILED` with what was wrong.
        extra: seconds that the stage took beyond an undisturbed one, all commands together.
    """

    kind: str
    stage: str
    run: int
    moment: float
    hit: str = ""
    outcome: str = ""
    cause: str = ""
    extra: float = 0.0


@dataclass
class Command:
    """A running `ckd-ray train`, followed line by line."""

    process: subprocess.Popen[str]
    stage: str = ""
    began: float = 0.0
    lines: list[str] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    family: dict[int, int] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def follow(self) -> None:
        """Read standard error to its end, and note where the command is."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            now = time.monotonic()
            with self.changed:
                self.lines.append(line.rstrip())
                found = re.match(r"(\w+): (starting|done before|.* -> )", line)
                if found and found[1] in STAGES:
                    if self.stage:
                        self.spent[self.stage] = self.spent.get(self.stage, 0.0) + now - self.began
                    self.stage, self.began = (found[1], now) if found[2] == "starting" else ("", now)
                    self.changed.notify_all()
        with self.changed:
            if self.stage:
                self.spent[self.stage] = self.spent.get(self.stage, 0.0) + time.monotonic() - self.began
            self.stage = "over"
            self.changed.notify_all()


class Soak:
    """All runs of one soak, in `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.backbone = tiny_bert(folder / "encoder")
        self.collection = str(write_collection(folder / "collection", passages=160, queries=300))
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
        values = overrides(
            storage, self.backbone, self.collection,
            "teacher.steps=30", "teacher.checkpoint_every=10", "distill.steps=30", "distill.checkpoint_every=10",
            "evaluate.measures=[MRR@10,nDCG@10]", "label.neighbours=exact",
        )  # fmt: skip
        sets = [part for value in values for part in ("--set", value)]
        hidden = ("RAY_ADDRESS", "CKD_RAY_TRACEBACK")
        environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"TMPDIR": str(self.folder / "tmp")}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.soak_command", "train", "--cluster", "local", *sets],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment,
        )  # fmt: skip
        command = Command(process)
        threading.Thread(target=command.follow, daemon=True).start()
        return command

    def wait(self, command: Command) -> int:
        """Its exit status; -999 when it hung, and was ended."""
        try:
            code = command.process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = -999
        if command.process.poll() is None:
            command.family |= {p.pid: p.started for p in below(command.process.pid)}
            os.kill(command.process.pid, signal.SIGKILL)
            command.process.wait()
        end_all(command.family)
        return code

    # -- what is compared ------------------------------------------------------------------------------------------

    def digests(self, run: Path) -> dict[str, str]:
        """SHA-256 of what a run is for: rankings, labels, both models' weights, values of every query, runs."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        found = {}
        for name in ("rankings", "labels"):
            table = pa.concat_tables([pq.read_table(p) for p in sorted((run / name).glob("train-*.parquet"))])
            found[name] = hashlib.sha256(json.dumps(table.to_pylist()).encode()).hexdigest()
        files = [run / m / f for m in ("teacher", "student") for f in ("model.safetensors", "projection.safetensors")]
        files += [*sorted((run / "evaluation").glob("*.per_query.json")), *sorted((run / "evaluation").glob("*.run"))]
        for path in files:
            found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def undisturbed(self, times: int) -> None:
        """The run that all others must be equal to; made twice, to be sure that equality may be asked for."""
        for name in ("undisturbed", "again")[:times]:
            command = self.start(self.folder / name)
            code = self.wait(command)
            if code != 0:
                raise SystemExit("the undisturbed run failed:\n" + "\n".join(command.lines[-20:]))
            found = self.digests(self.folder / name / "tiny")
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
            trouble = trouble or self._judge_stop(code, command.lines, mine, before)
            if attempt > len(mine) + 1 + unstarted:
                trouble = trouble or f"does not complete when run again: {command.lines[-3:]}"
                break
            if not any(fault.kind == ALTERED for fault in mine):
                mine += self._alter(storage, number)
        if code == 0 and not trouble:
            wrong = [k for k, v in self.digests(storage / "tiny").items() if v != self.expected[k]]
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
        trouble = self._judge_stop(code, command.lines, [fault], 0)
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

    def _judge_stop(self, code: int, lines: list[str], mine: list[Fault], before: int) -> str:
        """Note with the last fault that the command stopped; what was wrong with how it did. The faults from number
        `before` on are this command's."""
        last = next((line for line in reversed(lines) if line.startswith("ckd-ray: ")), "")
        cause = last or (lines[-1] if lines else "")
        if mine:
            mine[-1].outcome = mine[-1].outcome or "stopped, completed when run again"
            mine[-1].cause = mine[-1].cause or re.sub(re.escape(str(self.folder)), "DIR", cause)[:300]
        if code == -signal.SIGKILL and any(fault.kind == "kill driver" for fault in mine[before:]):
            mine[-1].cause = "killed"
            return ""
        if code == -999:
            return f"hung: {lines[-3:]}"
        if traceback := _traceback_of_ours(lines):
            return f"a traceback: {traceback[:200]}"
        if code not in (1, 2) or not last:
            return f"exit status {code} without a message: {lines[-2:]}"
        return ""

    def _remove(self, storage: Path) -> None:
        if storage in self.mounted:
            subprocess.run(["umount", "-l", str(storage)], check=False)
            self.mounted.discard(storage)
        shutil.rmtree(storage, ignore_errors=True)

    # -- faults ----------------------------------------------------------------------------------------------------

    def _inject(
        self, command: Command, storage: Path, left: dict[str, list[str]], mine: list[Fault], number: int
    ) -> None:
        """Wait for the stages of `left`, and break something at random moments of each."""
        seen: list[str] = []
        while True:
            with command.changed:
                command.changed.wait_for(lambda: command.stage == "over" or command.stage in {*left} - {*seen})
                stage, began = command.stage, command.began
            if stage == "over":
                return
            seen.append(stage)
            moments = sorted(self.rng.uniform(0.0, 0.9) * self.usual.get(stage, 1.0) for _ in left[stage])
            for moment, kind in zip(moments, list(left[stage]), strict=True):
                with command.changed:
                    until = max(0.0, began + moment - time.monotonic())
                    command.changed.wait_for(lambda: command.stage != seen[-1], timeout=until)
                    stage_now = command.stage
                if stage_now == "over" or command.process.poll() is not None:
                    return
                command.family |= {p.pid: p.started for p in below(command.process.pid)}
                fault = Fault(kind, stage_now or stage, number, round(time.monotonic() - began, 2))
                fault.hit = KINDS[kind](self, command, storage)
                if fault.hit:
                    left[stage].remove(kind)
                    mine.append(fault)
                    where = f"in {fault.stage} after {fault.moment} s"
                    print(f"  run {number}: {kind} {where}: {fault.hit[:80]}", flush=True)
            if not left[stage]:
                del left[stage]

    def _make_good(self, storage: Path) -> None:
        """What an operator would do before giving the command again: make room, make it writable."""
        if storage in self.mounted:
            subprocess.run(["mount", "-o", "remount,rw", str(storage)], check=True)
        for ballast in storage.glob("ballast-*"):
            ballast.unlink()


def _traceback_of_ours(lines: list[str]) -> str:
    """The last line of a traceback with a file of ours in it; Ray shows its own, of a worker without memory."""
    inside = mine = False
    for line in lines:
        if "Traceback (most recent call last)" in line:
            inside, mine = True, False
        elif inside and line.startswith(" "):
            mine = mine or "/ckd_ray/" in line
        elif inside and line.strip():
            if mine:
                return line
            inside = False
    return ""


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


def cut_address_space(pid: int) -> None:
    """Let a process have no more of it than it has now."""
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


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


def plan(soak: Soak, kinds: list[str], each: int) -> dict[str, list[str]]:
    """So many kinds for every stage, those that were injected least often first; of those that end the command at most
    one a stage."""
    counts = Counter((f.kind, f.stage) for f in soak.faults)
    totals = Counter(f.kind for f in soak.faults)
    chosen: dict[str, list[str]] = {}
    for stage in STAGES:
        chosen[stage] = []
        for _ in range(each):
            ending = bool(_ENDING & {*chosen[stage]})
            able = [k for k in kinds if stage not in _NOT_IN.get(k, ()) and totals[k] < _SELDOM.get(k, 10**9)]
            able = [k for k in able if k not in chosen[stage] and not (ending and k in _ENDING)]
            if able:
                soak.rng.shuffle(able)
                kind = min(able, key=lambda k: (counts[k, stage], totals[k]))
                chosen[stage].append(kind)
                counts[kind, stage] += 1
                totals[kind] += 1
    return chosen


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
        chosen = plan(soak, kinds, arguments.each)
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
