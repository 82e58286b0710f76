"""A `ray start --head` of a test's own, ended by its process group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
SMALL = ["--object-store-memory=157286400", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"]


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
