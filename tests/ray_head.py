"""A `ray start --head` of a test's own, ended by its process group; and a Ray of few processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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


@contextmanager
def started_head(folder: Path, environment: dict[str, str], *options: str) -> Iterator[None]:
    """Until the block ends; what it says is in `folder/out`."""
    out = folder / "out"
    with out.open("w") as log:
        process = subprocess.Popen(
            [*COMMAND, *SMALL, *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            cwd=folder,
        )
    try:
        deadline = time.monotonic() + 300
        while "Ray runtime started" not in out.read_text():
            assert process.poll() is None and time.monotonic() < deadline, out.read_text()
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
