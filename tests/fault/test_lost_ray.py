"""A command whose own Ray daemon is killed says so and ends; Ray itself would let it wait for ever."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault.processes import below, choose, end_all
from tests.support import overrides


@pytest.mark.soak
def test_a_killed_raylet_ends_the_command(tmp_path: Path, tiny_backbone: str, tiny_collection: str) -> None:
    values = overrides(tmp_path, tiny_backbone, tiny_collection)
    command = [sys.executable, "-m", "ckd_ray", "train", "--cluster", "local"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [*command, *(part for value in values for part in ("--set", value))],
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
                raylet = choose(process.pid, "raylet", random.Random(0))
                assert raylet is not None
                os.kill(raylet.pid, signal.SIGKILL)
        assert process.wait(timeout=300) == 1
    finally:
        family |= {p.pid: p.started for p in below(process.pid)}
        process.kill()
        process.wait()
        end_all(family)
    told = [line for line in lines if line.startswith("ckd-ray: ")]
    assert len(told) == 1 and "(raylet) has ended" in told[0] and "what was finished is kept" in told[0], lines[-5:]
    assert not any("Traceback (most recent call last)" in line for line in lines)
