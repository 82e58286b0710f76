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


# A process that has memory left for the stack of one thread, and for the objects of the thread that starts it, and for
# nothing else: the new thread dies at its first call.
NO_MEMORY = """
import mmap, os, resource, sys, threading
from ckd_ray.ray_util import processes
if sys.argv[1] == "ours":
    processes.end_when_broken()
    processes._TRIES = 2
threading.stack_size(2**20)
thread = threading.Thread(target=print, daemon=True)
room = mmap.mmap(-1, 2**20 + 3 * 4096)
now = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
spare = [[bytes(size) for _ in range(40)] for size in range(16, 513, 16)]
resource.setrlimit(resource.RLIMIT_AS, (now, now))
ballast, size = None, 2**16
while size >= 16:
    try:
        while True:
            ballast = (ballast, bytearray(size))
    except MemoryError:
        size //= 2
del spare
room.close()
thread.start()
os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
def test_a_thread_that_dies_before_it_begins_ends_the_process() -> None:
    command = [sys.executable, "-c", NO_MEMORY]
    with pytest.raises(subprocess.TimeoutExpired):  # what Python does
        subprocess.run([*command, "python's"], capture_output=True, timeout=10, check=False)
    done = subprocess.run([*command, "ours"], capture_output=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.endswith(processes._NEVER_BEGAN)


def test_threads_begin_and_are_joined_as_before() -> None:
    code = (
        "import threading; from concurrent.futures import ThreadPoolExecutor; from ckd_ray.ray_util import processes; "
        "processes.end_when_broken(); processes.end_when_broken(); "
        "done = list(ThreadPoolExecutor(4).map(abs, range(100))); "
        "timer = threading.Timer(0.01, print, ['rang']); timer.start(); timer.join(); print(sum(done))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "rang\n4950\n", done


def test_a_worker_of_ray_that_does_work_of_ours_is_guarded(ray_session: None) -> None:
    import ray

    def start_of_threads() -> str:
        import threading

        import ckd_ray  # noqa: F401

        return threading.Thread.start.__module__

    assert ray.get(ray.remote(num_cpus=0)(start_of_threads).remote(), timeout=120) == processes.__name__
