"""A process that is aborted ends, whatever a library has put in the way."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from ckd_ray.errors import UserError
from ckd_ray.ray_util import processes
from ckd_ray.ray_util.processes import actor_device, leave_a_lost_gpu

IN_THE_WAY = "import ctypes, os, signal, threading; ctypes.CDLL(None).signal(signal.SIGABRT, ctypes.c_void_p(1)); "
OURS = (
    "from ckd_ray.ray_util.processes import die_when_aborted as f; "
    "t = threading.Thread(target=f); t.start(); t.join(); "
)
ABORTED = "os.kill(os.getpid(), signal.SIGABRT)"


@pytest.mark.parametrize(("ours", "status"), [(OURS, -signal.SIGABRT), ("", 0)])
def test_abort_ends_the_process(ours: str, status: int) -> None:
    assert subprocess.run([sys.executable, "-c", IN_THE_WAY + ours + ABORTED], timeout=60).returncode == status


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert actor_device() == "cpu", "without Ray"
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_gpu_ids", lambda: [])
    assert actor_device() == "cpu"
    monkeypatch.setattr("ray.get_gpu_ids", lambda: [0])
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    with monkeypatch.context() as patched:
        patched.setattr(processes, "_try_gpu", lambda: None)
        assert actor_device() == "cuda"

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore")

    monkeypatch.setattr(processes, "_try_gpu", too_old)
    with pytest.raises(UserError, match=r"10\.0\.0\.7(.|\n)*too old\n(.|\n)*ckd-ray doctor"):
        actor_device()


@pytest.mark.parametrize(("used", "lost", "ended"), [(False, True, False), (True, False, False), (True, True, True)])
def test_a_process_whose_gpu_is_lost_ends(monkeypatch: pytest.MonkeyPatch, used: bool, lost: bool, ended: bool) -> None:
    def fails() -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    codes: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(processes, "_try_gpu", fails)
    monkeypatch.setattr("os._exit", codes.append)
    leave_a_lost_gpu()
    assert codes == ([1] if ended else [])
