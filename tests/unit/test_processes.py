"""A process that is aborted ends, whatever a library has put in the way."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

IN_THE_WAY = "import ctypes, os, signal, threading; ctypes.CDLL(None).signal(signal.SIGABRT, ctypes.c_void_p(1)); "
OURS = "from ckd_ray.processes import die_when_aborted as f; t = threading.Thread(target=f); t.start(); t.join(); "
ABORTED = "os.kill(os.getpid(), signal.SIGABRT)"


@pytest.mark.parametrize(("ours", "status"), [(OURS, -signal.SIGABRT), ("", 0)])
def test_abort_ends_the_process(ours: str, status: int) -> None:
    assert subprocess.run([sys.executable, "-c", IN_THE_WAY + ours + ABORTED], timeout=60).returncode == status
