"""What our processes on a cluster set up for themselves."""

from __future__ import annotations

import ctypes
import os
import signal

from ckd_ray.errors import UserError, first_line


def die_when_aborted() -> None:
    """Let abort() end this process at once; for actors, which come back.

    Ray's handler of fatal signals prints a trace, for which it wants memory. In a process that has none left it aborts
    in turn, is called again, and so on for ever: the process neither works nor ends, and its log fills the disk.
    """
    # 0 is SIG_DFL. Not signal.signal, which only the main thread may call.
    ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), ctypes.c_void_p(0))


def actor_device() -> str:
    """`cuda` in an actor that Ray has given a GPU, else `cpu`. Ray hides the GPUs of a machine from nobody, so that
    torch alone cannot tell: actors without one would all crowd on the first.

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
    """After an error: end this process, as a crash would, when its GPU cannot even add any more. Every later call would
    fail in it, whatever it is about; the process that takes its place begins anew."""
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
