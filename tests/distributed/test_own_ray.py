"""No other command finds a Ray that a command has started for itself, and one that was there before is found again."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

CODE = """
import ray
from ray._private.utils import read_ray_address, write_ray_address
from ckd_ray.ray_util.session import connected
before = {before!r}
if before:
    write_ray_address(before, {folder!r})
with connected("local"):
    print("noted:", read_ray_address({folder!r}), ray.is_initialized())
"""
TWO = """
import ray
from ckd_ray.ray_util.session import connected
with connected(None):
    print("own:", ray.get_runtime_context().gcs_address, flush=True)
    input()
"""


@pytest.mark.parametrize("before", [None, "127.0.0.1:9"])
def test_a_ray_in_place_is_not_found_by_others(before: str | None) -> None:
    with tempfile.TemporaryDirectory(prefix="r") as short:  # the path of a socket has 107 bytes at most
        folder = os.path.join(short, "ray")
        os.makedirs(folder)
        command = [sys.executable, "-c", CODE.format(before=before, folder=folder)]
        environment = {**os.environ, "RAY_TMPDIR": short}
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert f"noted: {before} True" in done.stdout, done.stderr


def test_two_commands_have_a_ray_each() -> None:
    """Started together, without a Ray on the machine; the second would die with the first one's."""
    with tempfile.TemporaryDirectory(prefix="r") as short:
        environment = {**os.environ, "RAY_TMPDIR": short}
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        commands = [subprocess.Popen([sys.executable, "-c", TWO], **pipe) for _ in range(2)]
        try:
            found = [next(line for line in command.stdout if line.startswith("own:")) for command in commands]
        finally:
            for command in commands:
                command.communicate("\n", timeout=200)
    assert len(set(found)) == 2, found
