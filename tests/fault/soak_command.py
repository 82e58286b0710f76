"""`ckd-ray` in a process whose clock can be set: SIGUSR1 puts time.time() a day forward, the next one a day back.

No machine's clock is touched; what is seen is what this process (the driver) asks time.time() for. With
CKD_SOAK_SERVERS in the environment, servers start for a store of any size.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

_offset = 0.0


class _Clock:
    """In the place of time.time(); sent to another process, it is the real one there, where no clock jumps."""

    real = time.time

    def __call__(self) -> float:
        return _Clock.real() + _offset

    def __reduce__(self) -> Any:
        return getattr, (time, "time")


def _jump(signum: int, frame: Any) -> None:
    global _offset
    _offset = 86400.0 if _offset <= 0 else -86400.0


def clock_in_reach() -> None:
    """From here on SIGUSR1 lets time.time() of this process jump."""
    signal.signal(signal.SIGUSR1, _jump)
    time.time = _Clock()


def main() -> None:
    """The command line, with the clock in reach."""
    clock_in_reach()
    from ckd_ray.cli import main as command

    if os.environ.get("CKD_SOAK_SERVERS"):
        from ckd_ray.retrieve import in_task

        in_task._MOST_BYTES = 0
    try:
        command()
    finally:
        # A signal on its way out, when Python takes its handlers back, would be the end of the process.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


if __name__ == "__main__":
    main()
