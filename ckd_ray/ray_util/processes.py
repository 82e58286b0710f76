"""What a worker process of ours does for itself: end when it is broken, and find its GPU."""

from __future__ import annotations

import ctypes
import os
import signal
import threading

from ckd_ray.errors import UserError, first_line

_python_s_start = threading.Thread.start
# How long a new thread may take to begin, in waits of one second. A pause of the whole process counts as one wait.
_TRIES = 60
_NEVER_BEGAN = b"ckd-ray: a new thread has died before it began, for lack of memory; its process ends\n"


class _Beginning(threading.Event):
    """The event by which a new thread reports that it has begun. A thread without memory for its first call never sets
    it, and `Thread.start` would wait for ever. This class then ends the process, by calls that allocate no memory."""

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is not None:
            return super().wait(timeout)
        for _ in range(_TRIES):
            if super().wait(1.0):
                return True
        try:
            os.write(2, _NEVER_BEGAN)
        finally:
            os._exit(1)


def end_when_broken() -> None:
    """Let this process end where a lack of memory would make it hang: when it is aborted, and when one of its threads
    dies before it begins. For Ray's workers, whose work is repeated, and for the command."""
    die_when_aborted()
    if type(getattr(threading.Thread(), "_started", None)) is threading.Event:  # as in Python 3.10 to 3.14
        threading.Thread.start = _guarded_start  # type: ignore[method-assign]


def _guarded_start(self: threading.Thread) -> None:
    self._started.__class__ = _Beginning  # type: ignore[attr-defined]
    _python_s_start(self)


def die_when_aborted() -> None:
    """Let abort() end this process at once.

    Ray's handler of fatal signals prints a trace, which needs memory. Without memory it aborts, is called again, and so
    on forever: the process neither works nor ends, and its log fills the disk.
    """
    # 0 is SIG_DFL. Not signal.signal, which only the main thread may call.
    ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), ctypes.c_void_p(0))


def actor_device() -> str:
    """`cuda` in an actor that Ray has given a GPU, else `cpu`.

    Torch cannot tell, because Ray does not hide the other GPUs: actors without one would all use the first.

    Raises:
        UserError: torch cannot use the GPU that was given.
    """
    import ray
    import torch

    if not ray.is_initialized() or not ray.get_gpu_ids():
        return "cpu"
    try:
        _try_gpu()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch for CPUs
        raise UserError(
            "Ray has given this process a GPU that PyTorch cannot use",
            where=f"machine {ray.util.get_node_ip_address()}",
            expected="a driver and a build of PyTorch that fit the GPU",
            found=f"PyTorch {torch.__version__}: {first_line(error)}",
            fix="ckd-ray doctor on that machine says more; or start its Ray with --num-gpus=0",
        ) from None
    return "cuda"


def leave_a_lost_gpu() -> None:
    """After an error, end this process if its GPU does not work any more: every later call in it would fail, while the
    process that replaces it works."""
    import torch

    if not torch.cuda.is_initialized():
        return
    try:
        _try_gpu()
    except RuntimeError:
        os._exit(1)


def _try_gpu() -> None:
    import torch

    torch.zeros(1, device="cuda").add_(1).item()
