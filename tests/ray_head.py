"""A `ray start --head` of a test's own, ended by its process group; and a Ray of few processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray._private import services
from ray._private.node import Node

COMMAND = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
SMALL = ["--object-store-memory=157286400", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"]


@contextmanager
def small_ray() -> Iterator[None]:
    """The nodes of Ray that this process starts meanwhile lack the processes that no test needs: of the autoscaler, of
    the dashboard (which gathers statistics even when it is off), and of the lines of workers. And they have as long to
    start as a busy machine takes; Ray would give up after 30 s."""

    def patient(*of_node: str) -> dict[str, Any]:
        deadline = time.monotonic() + 600
        while True:
            try:
                return get_node(*of_node)
            except RuntimeError:  # it is not there yet
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    get_node = services.get_node
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "get_node", patient)
        for name in ("start_monitor", "start_api_server", "start_log_monitor"):
            patch.setattr(Node, name, lambda self, **_: None)
        yield


_TRIES = 3
_SLOW = "timed out during startup"  # after 30 s, which a busy machine may need; `ray start` has no option for it


@contextmanager
def started_head(folder: Path, environment: dict[str, str], *options: str) -> Iterator[None]:
    """Until the block ends; what it says is in `folder/out`."""
    out = folder / "out"
    for tries_left in reversed(range(_TRIES)):
        process = _start(out, environment, options)
        try:
            if _is_up(process, out, last=not tries_left):
                yield
                return
        finally:
            _end(process)


def _start(out: Path, environment: dict[str, str], options: Sequence[str]) -> subprocess.Popen[bytes]:
    with out.open("w") as log:
        return subprocess.Popen(
            [*COMMAND, *SMALL, *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            cwd=out.parent,
        )


def _is_up(process: subprocess.Popen[bytes], out: Path, *, last: bool) -> bool:
    """False when the head was too slow to start, and may be tried again."""
    deadline = time.monotonic() + 300
    while "Ray runtime started" not in out.read_text():
        if process.poll() is not None and _SLOW in out.read_text() and not last:
            return False
        assert process.poll() is None and time.monotonic() < deadline, out.read_text()
        time.sleep(0.2)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
