"""What the soaks of whole commands share (`soak.py` on one machine, `soak_hosts.py` on several): the command that is
followed, the plan and the moments of faults, how a stop is judged, and what of a run is compared."""

from __future__ import annotations

import hashlib
import json
import random
import re
import resource
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

STAGES = ("collection", "teacher", "embed", "retrieve", "label", "ensemble", "distill", "evaluate")
# The tiny collection, and its settings beyond `tests.support.overrides`.
SIZE = {"passages": 160, "queries": 300}
SETTINGS = (
    "teacher.steps=30", "teacher.checkpoint_every=10", "distill.steps=30", "distill.checkpoint_every=10",
    "evaluate.measures=[MRR@10,nDCG@10]", "label.neighbours=exact",
)  # fmt: skip
HUNG = -999
_KILLING = ("kill driver",)
_MANY = 10**9


@dataclass
class Fault:
    """One fault that was injected, and what became of it.

    Attributes:
        moment: seconds after the stage began. hit: the process, file or host.
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

    @classmethod
    def begin(cls, line: list[str], environment: dict[str, str]) -> Command:
        """Run the command line in a session of its own, and follow it."""
        process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True, env=environment,
        )  # fmt: skip
        command = cls(process)
        threading.Thread(target=command.follow, daemon=True).start()
        return command

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


def digests(run: Path) -> dict[str, str]:
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


def judge_stop(
    code: int, lines: list[str], mine: list[Fault], before: int, folder: Path, killing: Collection[str] = _KILLING
) -> str:
    """Note with the last fault that the command stopped; what was wrong with how it did.

    Args:
        before: the faults from this number on are this command's. folder: hidden in what is noted.
        killing: the kinds that kill the command itself, which then says nothing.
    """
    last = next((line for line in reversed(lines) if line.startswith("ckd-ray: ")), "")
    cause = last or (lines[-1] if lines else "")
    if mine:
        mine[-1].outcome = mine[-1].outcome or "stopped, completed when run again"
        mine[-1].cause = mine[-1].cause or re.sub(re.escape(str(folder)), "DIR", cause)[:300]
    if code == -signal.SIGKILL and any(fault.kind in killing for fault in mine[before:]):
        mine[-1].cause = "killed"
        return ""
    if code == HUNG:
        return f"hung: {lines[-3:]}"
    if traceback := traceback_of_ours(lines):
        return f"a traceback: {traceback[:200]}"
    if code not in (1, 2) or not last:
        return f"exit status {code} without a message: {lines[-2:]}"
    return ""


def traceback_of_ours(lines: list[str]) -> str:
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


def inject(
    command: Command,
    left: dict[str, list[str]],
    mine: list[Fault],
    number: int,
    *,
    usual: Mapping[str, float],
    rng: random.Random,
    act: Callable[[str], str],
) -> None:
    """Wait for the stages of `left`, and break something at random moments of each; what could be broken moves from
    `left` to `mine`.

    Args:
        number: of the run. usual: seconds of an undisturbed stage.
        act: breaks something of a kind, and says what; nothing where there is nothing of that kind.
    """
    seen: list[str] = []
    while True:
        with command.changed:
            command.changed.wait_for(lambda: command.stage == "over" or command.stage in {*left} - {*seen})
            stage, began = command.stage, command.began
        if stage == "over":
            return
        seen.append(stage)
        moments = sorted(rng.uniform(0.0, 0.9) * usual.get(stage, 1.0) for _ in left[stage])
        for moment, kind in zip(moments, list(left[stage]), strict=True):
            with command.changed:
                until = max(0.0, began + moment - time.monotonic())
                command.changed.wait_for(lambda: command.stage != seen[-1], timeout=until)
                stage_now = command.stage
            if stage_now == "over" or command.process.poll() is not None:
                return
            fault = Fault(kind, stage_now or stage, number, round(time.monotonic() - began, 2))
            fault.hit = act(kind)
            if fault.hit:
                left[stage].remove(kind)
                mine.append(fault)
                where = f"in {fault.stage} after {fault.moment} s"
                print(f"  run {number}: {kind} {where}: {fault.hit[:80]}", flush=True)
        if not left[stage]:
            del left[stage]


def plan(
    rng: random.Random,
    faults: list[Fault],
    kinds: list[str],
    each: int,
    *,
    not_in: Mapping[str, Collection[str]],
    ending: Collection[str],
    seldom: Mapping[str, int],
) -> dict[str, list[str]]:
    """So many kinds for every stage, those that were injected least often first.

    Args:
        faults: those that were injected.
        not_in: the stages in which a kind cannot be met.
        ending: the kinds that end the command; at most one of them a stage.
        seldom: how often a kind is injected at most; those without a number are not limited.
    """
    counts = Counter((f.kind, f.stage) for f in faults)
    totals = Counter(f.kind for f in faults)
    chosen: dict[str, list[str]] = {}
    for stage in STAGES:
        chosen[stage] = []
        for _ in range(each):
            ends = bool({*ending} & {*chosen[stage]})
            able = [k for k in kinds if stage not in not_in.get(k, ()) and totals[k] < seldom.get(k, _MANY)]
            able = [k for k in able if k not in chosen[stage] and not (ends and k in ending)]
            if able:
                rng.shuffle(able)
                kind = min(able, key=lambda k: (counts[k, stage], totals[k]))
                chosen[stage].append(kind)
                counts[kind, stage] += 1
                totals[kind] += 1
    return chosen


def cut_address_space(pid: int) -> None:
    """Let a process have no more of it than it has now."""
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
