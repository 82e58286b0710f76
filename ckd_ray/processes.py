"""What our processes on a cluster set up for themselves."""

from __future__ import annotations

import ctypes
import signal


def die_when_aborted() -> None:
    """Let abort() end this process at once; for actors, which come back.

    Ray's handler of fatal signals prints a trace, for which it wants memory. In a process that has none left it aborts
    in turn, is called again, and so on for ever: the process neither works nor ends, and its log fills the disk.
    """
    # 0 is SIG_DFL. Not signal.signal, which only the main thread may call.
    ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), ctypes.c_void_p(0))
