"""A command whose Ray daemon is killed says so and ends; Ray itself would let it wait for ever, or end it without a
word."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fault.processes import below, choose, end_all
from tests.ray_head import started_head
from tests.support import overrides

COMMAND = [sys.executable, "-m", "ckd_ray", "train", "--cluster"]


@pytest.mark.soak
def test_a_killed_raylet_ends_the_command(tmp_path: Path, tiny_backbone: str, tiny_collection: str) -> None:
    told = kill_meanwhile(
        overrides(tmp_path, tiny_backbone, tiny_collection), "local", "raylet", lambda command: command
    )
    assert "(raylet) has ended" in told


@pytest.mark.soak
@pytest.mark.parametrize("role", ["raylet", "gcs"])
def test_so_does_one_of_a_ray_that_was_joined(
    tmp_path: Path, tiny_backbone: str, tiny_collection: str, role: str
) -> None:
    """`ray start --block` ends the raylet when the head's GCS has ended; elsewhere the raylet goes on for a minute."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    (tmp_path / "head").mkdir()
    with started_head(tmp_path / "head", environment, f"--port={port}", "--include-dashboard=false"):
        values = overrides(tmp_path, tiny_backbone, tiny_collection)
        told = kill_meanwhile(values, f"127.0.0.1:{port}", role, lambda command: os.getpid())
    assert "(raylet) has ended" in told or (role == "gcs" and "Ray's head at 127.0.0.1:" in told)


def kill_meanwhile(values: list[str], cluster: str, role: str, root: Callable[[int], int]) -> str:
    """Kill the daemon while a teacher is trained; the one message with which the command ends.

    Args:
        root: below which process the daemon is, by the number of the command.
    """
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [*COMMAND, cluster, *(part for value in values for part in ("--set", value))],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=environment,
    )
    lines: list[str] = []
    family: dict[int, int] = {}
    assert process.stderr is not None
    try:
        for line in process.stderr:
            lines.append(line)
            if line.startswith("teacher: starting"):
                family = {p.pid: p.started for p in below(process.pid)}
                daemon = choose(root(process.pid), role, random.Random(0))
                assert daemon is not None
                os.kill(daemon.pid, signal.SIGKILL)
        assert process.wait(timeout=300) == 1, lines
    finally:
        family |= {p.pid: p.started for p in below(process.pid)}
        process.kill()
        process.wait()
        end_all(family)
    told = [line for line in lines if line.startswith("ckd-ray: ")]
    assert len(told) == 1 and "what was finished is kept" in told[0], lines[-5:]
    assert not any("Traceback (most recent call last)" in line for line in lines)
    return told[0]
