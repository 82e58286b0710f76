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


@pytest.mark.parametrize("before", [None, "127.0.0.1:9"])
def test_a_ray_in_place_is_not_found_by_others(before: str | None) -> None:
    with tempfile.TemporaryDirectory(prefix="r") as short:  # the path of a socket has 107 bytes at most
        folder = os.path.join(short, "ray")
        os.makedirs(folder)
        command = [sys.executable, "-c", CODE.format(before=before, folder=folder)]
        environment = {**os.environ, "RAY_TMPDIR": short}
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert f"noted: {before} True" in done.stdout, done.stderr
