"""Runs the whole job on two hosts and an object store again and again, breaks hosts, network, storage and processes at
random moments of every stage, and compares what comes out with an undisturbed run.

    python -m tests.fault.soak_hosts --faults 200 --seed 1 --out tests/fault/faults_hosts.json

Hosts are Linux namespaces (`netns_hosts.py`) with a Ray node each; the head and the command are on the first, and a
third comes and goes. The run lies in a bucket of an S3 server outside of the hosts (`s3_server.py`), behind a server
that can answer late or badly (`bad_storage.py`). A host's own disk (Ray's session, temporary files, the cache of remote
files) is a small tmpfs. A Ray node that has ended is started again, as a machine's service manager would; the head is
started again before the command is given again. Needs root.
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
import urllib.parse
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from tests.fault.bad_storage import BadStorage
from tests.fault.netns_hosts import Hosts, missing
from tests.fault.processes import Process, below, choose_of, inside
from tests.fault.s3_server import Server
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
from tests.support import overrides, tiny_bert, write_collection

ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 1500.0
_START_S = 240.0
_DISK = "256m"
_OWN = "tmp/ray/ckd"  # on the small disk of each host
_DAY_S = 86400.0
_FEW, _STOP_S, _CUT_S, _LONG_CUT_S, _SLOW_S, _BAD_S, _FULL_S, _STAY_S = 3.0, 5.0, 10.0, 300.0, 20.0, 15.0, 15.0, 45.0
_DELAY_S, _SHARE = 0.2, 0.3
# Two workers would add in another order. The ensemble scores with BM25 alone: to embed once more is nothing new.
_MORE_SETTINGS = ("teacher.workers=1", "distill.workers=1", "distill.encoder_share=0")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "passive",
    "AWS_EC2_METADATA_DISABLED": "true",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": str(int(_START_S)),
    "RAY_enable_metrics_collection": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # A node that does not answer is dead after half a minute, not after more than one; it outlasts a cut of 10 s.
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_TMPDIR": "/tmp/ray",
    "TMPDIR": f"/{_OWN}/tmp",
    "CKD_RAY_CACHE": f"/{_OWN}/cache",
    "CKD_SOAK_CLOCK": f"/{_OWN}/clock",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fault' / 'host_clock'}",
    "HOME": "/root",
    "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
# Ray ends the workers of a node whose machine uses more than this share of its memory: here always.
_SHORT_OF_MEMORY = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "250"}


class Later:
    """Calls that are due some seconds from now, each made once."""

    def __init__(self) -> None:
        self._lock, self._waiting = threading.Lock(), dict[threading.Timer, tuple[Callable[[], None], bool]]()

    def after(self, seconds: float, call: Callable[[], None], *, keep: bool = False) -> None:
        """Make the call then; `now` does not advance those to `keep`."""
        timer = threading.Timer(seconds, lambda: self._make(timer))
        timer.daemon = True
        with self._lock:
            self._waiting[timer] = call, keep
        timer.start()

    def now(self, *, all_of_them: bool = False) -> None:
        """Make the calls that are waiting."""
        with self._lock:
            due = [timer for timer, (_, keep) in self._waiting.items() if all_of_them or not keep]
        for timer in due:
            timer.cancel()
            self._make(timer)

    def _make(self, timer: threading.Timer) -> None:
        with self._lock:
            call, _ = self._waiting.pop(timer, (None, False))
        if call is not None:
            try:
                call()
            except Exception as error:  # a host that has gone meanwhile; its keeper sees to it
                print(f"  (later: {type(error).__name__}: {error})", flush=True)


class Field:
    """Hosts with Ray, and the storage."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.later = folder, Later()
        python = str(Path(sys.executable).parent)
        names = {"network": "10.79.0", "bridge": "ckdsbr", "prefix": "ckds"}
        self.hosts = Hosts(3, folder / "hosts", python, on=2, disk=_DISK, **names)
        self.head, self.second, self.third = self.hosts.names
        self.wanted = {self.second}  # the hosts that shall have a Ray node, beside the head
        self.cuts: set[str] = set()
        self.extra: dict[str, dict[str, str]] = {}
        self.head_up, self.over = threading.Event(), threading.Event()
        self.server: Server | None = None

    def __enter__(self) -> Field:
        self.hosts.__enter__()
        for name in (self.head, self.second):
            self.prepare(name)
        self.bad = BadStorage("127.0.0.1", 1, seed=1, bind=self.hosts.gateway)
        for name in (self.second, self.third):
            threading.Thread(target=self._keep, args=(name,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.later.now(all_of_them=True)
        for name in self.hosts.names:
            if self.hosts.is_on(name):
                self.end_ray(name)
        self.hosts.__exit__()
        self.bad.stop()
        if self.server:
            self.server.kill()

    # -- storage ---------------------------------------------------------------------------------------------------

    def new_storage(self, number: int) -> str:
        """An empty bucket; the URI of a folder in it."""
        if self.server:
            self.server.kill()
            shutil.rmtree(self.server.folder, ignore_errors=True)
        self.server = Server(self.folder / f"bucket-{number:03d}")
        self.server.start()
        self.bad.target = "127.0.0.1", self.server.port
        options = f"scheme=http&endpoint_override={self.hosts.gateway}:{self.bad.port}&allow_bucket_creation=true"
        return f"s3://key:secret@ckd-ray/run-{number:03d}?{options}"

    def run_files(self, number: int) -> Path:
        """The run as a folder, from what the server keeps on the disk."""
        assert self.server is not None
        out = self.folder / "files"
        shutil.rmtree(out, ignore_errors=True)
        for path in (self.server.folder / "ckd-ray").glob("*"):
            name = urllib.parse.unquote(path.name)
            if not name.endswith("/"):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, out / name)
        return out / f"run-{number:03d}" / "tiny"

    # -- hosts and Ray -----------------------------------------------------------------------------------------------

    def prepare(self, name: str) -> None:
        """The folders of a host that was switched on."""
        for folder in ("tmp", "cache"):
            (self.hosts.files(name) / _OWN / folder).mkdir(mode=0o700, parents=True)

    def processes(self, *names: str) -> list[Process]:
        """Of these hosts, or of all."""
        found = []
        for name in names or self.hosts.names:
            if self.hosts.is_on(name):
                with suppress(OSError, IndexError, KeyError):
                    found += inside(self.hosts.first_process(name))
        return found

    def has_ray(self, name: str) -> bool:
        """Whether a Ray node runs on the host; on the head, with its GCS."""
        roles = {process.role for process in self.processes(name)}
        return "raylet" in roles and (name != self.head or "gcs" in roles)

    def end_ray(self, name: str) -> None:
        """Kill all of Ray on a host."""
        for process in self.processes(name):
            if process.title.startswith("ray::") or "/ray/" in process.title:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def start_ray(self, name: str, *options: str) -> bool:
        """`ray start` on a host, after what was left of an earlier one is gone."""
        self.end_ray(name)
        with suppress(OSError, KeyError):
            for session in (self.hosts.files(name) / "tmp/ray/ray").glob("session_*"):
                shutil.rmtree(session, ignore_errors=True)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={self.address(name)}"]
        command += ["--num-cpus=1", "--object-store-memory=90000000", "--disable-usage-stats"]
        command += ["--include-log-monitor=false", *options]
        with (self.folder / f"ray-{name}.log").open("ab") as log:
            environment = _ENVIRONMENT | self.extra.get(name, {})
            try:
                done = subprocess.run(
                    self.hosts.inside(name, *command),
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, timeout=_START_S,
                )  # fmt: skip
            except (subprocess.TimeoutExpired, OSError, IndexError, KeyError):
                return False
        return done.returncode == 0

    def address(self, name: str) -> str:
        """Of a host."""
        return self.hosts.addresses[name]

    @property
    def ray_address(self) -> str:
        """Of the head."""
        return f"{self.address(self.head)}:6379"

    def ensure_head(self) -> None:
        """Start Ray on all hosts anew where the head is lost. The second host follows by itself."""
        if not self.hosts.is_on(self.head):
            self.hosts.switch_on(self.head)
            self.prepare(self.head)
        if self.has_ray(self.head):
            self.head_up.set()
            return
        self.head_up.clear()
        for _ in range(5):
            if self.start_ray(self.head, "--head", "--port=6379", "--include-dashboard=false"):
                for name in (self.second, self.third):
                    if self.hosts.is_on(name):
                        self.end_ray(name)
                self.head_up.set()
                return
        raise SystemExit(f"Ray's head does not start: {(self.folder / f'ray-{self.head}.log').read_text()[-2000:]}")

    def wait_for_second(self, seconds: float = 120.0) -> None:
        """Until the second host is part of Ray, unless its network is cut."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.second not in self.cuts and not self.has_ray(self.second):
            time.sleep(0.5)

    def _keep(self, name: str) -> None:
        """Start Ray on the host whenever it shall run there and does not."""
        while not self.over.wait(1.0):
            if name in self.wanted and name not in self.cuts and self.hosts.is_on(name) and self.head_up.is_set():
                with suppress(OSError, IndexError, KeyError):
                    if not self.has_ray(name):
                        self.start_ray(name, f"--address={self.ray_address}")

    def switch_off(self, name: str) -> None:
        """Power off; the cable is in place when it is switched on again."""
        self.cuts.discard(name)
        self.hosts.switch_off(name)

    def switch_on(self, name: str) -> None:
        """A machine of the same address, with nothing on its disk."""
        if not self.hosts.is_on(name) and not self.over.is_set():
            self.hosts.switch_on(name)
            self.prepare(name)


class Soak:
    """All runs of one soak."""

    def __init__(self, field: Field, seed: int) -> None:
        self.field, self.folder, self.rng = field, field.folder, random.Random(seed)
        self.backbone = tiny_bert(self.folder / "encoder")
        self.collection = str(write_collection(self.folder / "collection", **SIZE))
        self.faults: list[Fault] = []
        self.usual: dict[str, float] = {}
        self.expected: dict[str, str] = {}

    def start(self, storage: str, *, servers: bool = False) -> Command:
        """`ckd-ray train` on the first host, which joins the Ray there."""
        values = overrides(storage, self.backbone, self.collection, *SETTINGS, *_MORE_SETTINGS)
        sets = [part for value in values for part in ("--set", value)]
        line = [sys.executable, "-m", "tests.fault.soak_command", "train", "--cluster", self.field.ray_address, *sets]
        environment = _ENVIRONMENT | ({"CKD_SOAK_SERVERS": "1"} if servers else {})
        return Command.begin(self.field.hosts.inside(self.field.head, *line), environment)

    def wait(self, command: Command) -> int:
        """Its exit status; `HUNG` when it did not end, and was ended."""
        try:
            return command.process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for process in below(command.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            command.process.wait()
            return HUNG

    def undisturbed(self, times: int) -> None:
        """The run that all others must be equal to."""
        for number in range(times):
            storage = self.field.new_storage(999 - number)
            self.field.ensure_head()
            self.field.wait_for_second()
            command = self.start(storage, servers=number > 0)
            code = self.wait(command)
            (self.folder / f"lines-{999 - number}.log").write_text("\n".join(command.lines))
            if code != 0:
                raise SystemExit("the undisturbed run failed:\n" + "\n".join(command.lines[-20:]))
            found = digests(self.field.run_files(999 - number))
            if self.expected and found != self.expected:
                raise SystemExit(f"two undisturbed runs differ: {[k for k in found if found[k] != self.expected[k]]}")
            self.expected, self.usual = found, command.spent
        print(f"undisturbed: {', '.join(f'{k} {v:.1f} s' for k, v in self.usual.items())}", flush=True)

    def run(self, number: int, chosen: dict[str, list[str]]) -> list[Fault]:
        """One run with the faults of `chosen` (stage -> kinds); what became of them."""
        storage = self.field.new_storage(number)
        left, mine, spent = {k: list(v) for k, v in chosen.items()}, list[Fault](), Counter[str]()
        trouble, waited, code, log = "", 0, HUNG, list[str]()
        for attempt in range(30 + 3 * sum(map(len, chosen.values()))):
            self.field.ensure_head()
            self.field.wait_for_second()
            before = len(mine)
            command = self.start(storage, servers=number % 2 == 1)
            injector = threading.Thread(target=self._inject, args=(command, left, mine, number))
            injector.start()
            code = self.wait(command)
            injector.join()
            self.field.later.now()
            spent.update(command.spent)
            log += [*command.lines, f"=== exit status {code}"]
            (self.folder / f"lines-{number:03d}.log").write_text("\n".join(log))
            if code == 0:
                break
            print(f"  run {number}: exit status {code}: {_last(command)[:160]}", flush=True)
            if wrong := judge_stop(code, command.lines, mine, before, self.folder, _KILLING):
                print(f"  run {number}: FAILED: {wrong}", flush=True)
                for fault in mine[before:] or mine[-1:]:  # one of these, or all together
                    fault.outcome = f"FAILED: {wrong}"
            if "another ckd-ray works in this run" in _last(command) and waited < 20:
                waited += 1  # of the host that has lost its power: nobody can tell before it was silent for 3 minutes
                time.sleep(15)
            elif attempt > len(mine) + 2 + waited:
                trouble = f"does not complete when run again: {command.lines[-3:]}"
                break
        if code == 0:
            others = [k for k, v in digests(self.field.run_files(number)).items() if v != self.expected[k]]
            trouble = f"differs from the undisturbed run: {', '.join(others)}" if others else ""
        elif not trouble:
            trouble = "does not complete when run again"
        for fault in mine:
            fault.outcome = f"FAILED: {trouble}" if trouble else fault.outcome or "went on"
            fault.extra = round(max(0.0, spent[fault.stage] - self.usual.get(fault.stage, 0.0)), 1)
        if trouble:
            print(f"  run {number}: FAILED: {trouble}", flush=True)
            with suppress(OSError):
                shutil.copytree(self.field.run_files(number), self.folder / f"failed-{number:03d}")
        return mine

    def _inject(self, command: Command, left: dict[str, list[str]], mine: list[Fault], number: int) -> None:
        def act(kind: str) -> str:
            try:
                return KINDS[kind](self, command)
            except (OSError, IndexError, KeyError, RuntimeError) as error:  # a host that goes at this very moment
                print(f"  (not done: {kind}: {type(error).__name__}: {error})", flush=True)
                return ""

        inject(command, left, mine, number, usual=self.usual, rng=self.rng, act=act)


def _last(command: Command) -> str:
    return next((line for line in reversed(command.lines) if line.startswith("ckd-ray: ")), "")


# -- faults --------------------------------------------------------------------------------------------------------

Kind = Callable[[Soak, Command], str]


def _power(soak: Soak, command: Command) -> str:
    field = soak.field
    if not field.hosts.is_on(field.second):
        return ""
    field.switch_off(field.second)
    back = soak.rng.uniform(5.0, 15.0)
    field.later.after(back, lambda: field.switch_on(field.second), keep=True)
    return f"{field.second}, another one after {back:.0f} s"


def _power_of_head(soak: Soak, command: Command) -> str:
    soak.field.head_up.clear()
    soak.field.switch_off(soak.field.head)
    return soak.field.head


def _comes(extra: dict[str, str]) -> Kind:
    def act(soak: Soak, command: Command) -> str:
        field = soak.field
        if field.hosts.is_on(field.third):
            return ""
        field.extra[field.third] = extra
        field.switch_on(field.third)
        field.wanted.add(field.third)

        def leave() -> None:
            field.wanted.discard(field.third)
            field.switch_off(field.third)

        field.later.after(_STAY_S, leave, keep=True)
        return f"{field.third} for {_STAY_S:.0f} s"

    return act


def _cut(seconds: float) -> Kind:
    def act(soak: Soak, command: Command) -> str:
        field = soak.field
        if field.second in field.cuts or not field.hosts.is_on(field.second):
            return ""
        field.cuts.add(field.second)
        field.hosts.cut(field.second)

        def plug_in() -> None:
            if field.second in field.cuts:  # else it has lost its power meanwhile
                field.hosts.plug_in(field.second)
                field.cuts.discard(field.second)

        field.later.after(seconds, plug_in, keep=True)
        return f"{field.second} for {seconds:.0f} s"

    return act


def _no_storage(seconds: float, everywhere: bool) -> Kind:
    def act(soak: Soak, command: Command) -> str:
        hosts = soak.field.hosts
        names = [name for name in hosts.names if hosts.is_on(name)]
        names = names if everywhere else [soak.rng.choice(names)]

        def join() -> None:
            for name in names:
                with suppress(RuntimeError):  # it has lost its power, or another call was first
                    hosts.join_gateway(name)

        for name in names:
            hosts.cut_gateway(name)
        soak.field.later.after(seconds, join)
        return f"from {', '.join(names)} for {seconds:.0f} s"

    return act


def _slow(soak: Soak, command: Command) -> str:
    bad = soak.field.bad
    bad.delay = _DELAY_S
    soak.field.later.after(_SLOW_S, lambda: setattr(bad, "delay", 0.0))
    return f"{_DELAY_S:g} s before every answer for {_SLOW_S:.0f} s"


def _failing(soak: Soak, command: Command) -> str:
    bad = soak.field.bad
    bad.share = _SHARE
    soak.field.later.after(_BAD_S, lambda: setattr(bad, "share", 0.0))
    return f"{_SHARE:.0%} of the answers for {_BAD_S:.0f} s"


def _storage_killed(soak: Soak, command: Command) -> str:
    server = soak.field.server
    assert server is not None
    server.kill()
    soak.field.later.after(_FEW, server.start)
    return f"back after {_FEW:.0f} s"


def _clock_of_driver(soak: Soak, command: Command) -> str:
    driver = _driver(command)
    if driver:
        os.kill(driver, signal.SIGUSR1)
    return "time.time() of the driver, by a day" if driver else ""


def _clock_of_host(soak: Soak, command: Command) -> str:
    name = soak.rng.choice([soak.field.head, soak.field.second])
    if not soak.field.hosts.is_on(name):
        return ""
    clock = soak.field.hosts.files(name) / _OWN / "clock"
    offset = soak.rng.choice([-_DAY_S, _DAY_S])
    clock.write_text(str(offset))
    soak.field.later.after(_SLOW_S, lambda: clock.unlink(missing_ok=True))
    return f"{name}: time.time() by {offset:+.0f} s for {_SLOW_S:.0f} s"


def _full(soak: Soak, command: Command) -> str:
    name = soak.rng.choice([soak.field.head, soak.field.second])
    if not soak.field.hosts.is_on(name):
        return ""
    ballast = soak.field.hosts.files(name) / _OWN / f"ballast-{time.monotonic_ns()}"
    for block in (1 << 20, 512):
        with suppress(OSError), open(ballast, "ab", buffering=0) as file:
            while True:
                file.write(bytes(block))
    soak.field.later.after(_FULL_S, lambda: ballast.unlink(missing_ok=True))
    return f"{name} for {_FULL_S:.0f} s"


def _driver(command: Command) -> int | None:
    """The command itself: the process here is the one that has entered the host."""
    return next((process.pid for process in below(command.process.pid)), None)


def _target(soak: Soak, command: Command, role: str) -> tuple[int, str] | None:
    if role == "driver":
        driver = _driver(command)
        return (driver, "the driver") if driver else None
    names = {"raylet": [soak.field.second], "head": [soak.field.head]}.get(role, [])
    if role == "head":
        role = soak.rng.choice(["raylet", "gcs"])
    found = choose_of(soak.field.processes(*names), role, soak.rng)
    return (
        (found.pid, os.path.basename(found.title.split()[0]) if role in ("raylet", "gcs") else found.title[:60])
        if found
        else None
    )


def _kill(role: str) -> Kind:
    def act(soak: Soak, command: Command) -> str:
        target = _target(soak, command, role)
        if target is None:
            return ""
        with suppress(ProcessLookupError):
            os.kill(target[0], signal.SIGKILL)
        return target[1]

    return act


def _stop(role: str) -> Kind:
    def act(soak: Soak, command: Command) -> str:
        target = _target(soak, command, role)
        if target is None:
            return ""

        def go_on() -> None:
            for pid in (target[0], command.process.pid):  # nsenter stops with the driver, its child
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

        with suppress(ProcessLookupError):
            os.kill(target[0], signal.SIGSTOP)
            soak.field.later.after(_STOP_S, go_on)
        return f"{target[1]} for {_STOP_S:.0f} s"

    return act


def _no_memory(soak: Soak, command: Command) -> str:
    target = _target(soak, command, "actor")
    if target is None:
        return ""
    with suppress(OSError, ValueError):
        cut_address_space(target[0])
        return target[1]
    return ""


KINDS: dict[str, Kind] = {
    "host loses its power": _power,
    "host comes, and loses its power": _comes({}),
    "host short of memory comes and goes": _comes(_SHORT_OF_MEMORY),
    "network of a host cut for 10 s": _cut(_CUT_S),
    "network of a host cut for 5 min": _cut(_LONG_CUT_S),
    "storage out of reach for 10 s": _no_storage(_CUT_S, everywhere=True),
    "storage out of one host's reach for a minute": _no_storage(60.0, everywhere=False),
    "storage slow": _slow,
    "storage failing": _failing,
    "storage killed": _storage_killed,
    "clock of the driver jumps a day": _clock_of_driver,
    "clock of a host jumps a day": _clock_of_host,
    "disk of a host full": _full,
    "no memory for an actor": _no_memory,
    "kill actor": _kill("actor"),
    "kill worker": _kill("worker"),
    "kill raylet of a host": _kill("raylet"),
    "kill driver": _kill("driver"),
    "kill head of Ray": _kill("head"),
    "head's host loses its power": _power_of_head,
    "stop actor": _stop("actor"),
    "stop worker": _stop("worker"),
    "stop raylet of a host": _stop("raylet"),
    "stop driver": _stop("driver"),
}
_ACTORS = ("kill actor", "stop actor", "no memory for an actor")
_NOT_IN = {kind: {"collection"} for kind in _ACTORS}
_ENDING = {"kill driver", "kill head of Ray", "head's host loses its power"}
_KILLING = ("kill driver", "head's host loses its power")
_SELDOM = {
    "network of a host cut for 5 min": 3,
    "storage out of one host's reach for a minute": 6,
    "kill head of Ray": 7,
    "head's host loses its power": 1,
}


def main() -> None:
    """Inject `--faults` faults, and write what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", required=True)
    parser.add_argument("--each", type=int, default=3, help="faults a stage and run")
    parser.add_argument("--once", action="store_true", help="make one undisturbed run, not two that are compared")
    parser.add_argument("--undisturbed", help="a file that keeps what the undisturbed run was, for further soaks")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--kinds", help="only these, separated by semicolons")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the runs")
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    for number in (signal.SIGTERM, signal.SIGINT):  # so that no host is left; a shell's background job ignores SIGINT
        signal.signal(number, signal.default_int_handler)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="ckd-soak-hosts-"))
    folder.chmod(0o755)
    print(folder, flush=True)
    kinds = [k for k in KINDS if not arguments.kinds or k in arguments.kinds.split(";")]
    with Field(folder) as field:
        soak = Soak(field, arguments.seed)
        kept = Path(arguments.undisturbed) if arguments.undisturbed else None
        if kept and kept.exists():
            soak.expected, soak.usual = json.loads(kept.read_text())
        else:
            soak.undisturbed(1 if arguments.once else 2)
            if kept:
                kept.write_text(json.dumps([soak.expected, soak.usual]))
        number = 0
        while len(soak.faults) < arguments.faults and time.monotonic() - began < 60 * arguments.minutes:
            rules = {"not_in": _NOT_IN, "ending": _ENDING, "seldom": _SELDOM}
            soak.faults += soak.run(number, plan(soak.rng, soak.faults, kinds, arguments.each, **rules))
            number += 1
            write(Path(arguments.out), soak, number, time.monotonic() - began)
    failed = [f for f in soak.faults if f.outcome.startswith("FAILED")]
    print(f"{len(soak.faults)} faults in {number} runs, {len(failed)} failed", flush=True)
    if not arguments.keep and not failed:
        shutil.rmtree(folder, ignore_errors=True)


def write(out: Path, soak: Soak, runs: int, seconds: float) -> None:
    """The record so far."""
    words = [os.path.basename(word) if word.startswith("/") else word for word in sys.argv[1:]]
    record = {
        "command": f"python -m tests.fault.soak_hosts {' '.join(words)}",
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]},
        "runs": runs,
        "seconds": round(seconds, 1),
        "undisturbed_seconds": {k: round(v, 1) for k, v in soak.usual.items()},
        "injected": len(soak.faults),
        "failed": sum(f.outcome.startswith("FAILED") for f in soak.faults),
        "bad_answers": dict(soak.field.bad.given),
        "table": rows([asdict(f) for f in soak.faults], list(KINDS), list(STAGES)),
        "faults": [asdict(f) for f in soak.faults],
    }
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
