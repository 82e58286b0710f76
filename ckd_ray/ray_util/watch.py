"""Watches for the loss of Ray: without the daemon of this machine (raylet), a call that waits for Ray never returns.

A thread looks once a second. It prints a loss at once, because Ray may end the process with status 1 and no message.
Then it sends SIGTERM, whose handler (`terminate`) raises what `lost` returns. If the process has not ended
after a minute, the thread ends it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ckd_ray.errors import LostRayError
from ckd_ray.progress import say
from ckd_ray.ray_util.again import same_command

_LOOK_S, _ASK_S = 1.0, 10.0
PATIENCE_S = 60.0
_why: str | None = None


def lost() -> str | None:
    """Why this process has lost its Ray; None while it has one."""
    return _why


def terminate(signum: int, frame: Any) -> None:
    """The handler of SIGTERM: end as Ctrl-C does, or with the reason where Ray is lost."""
    if _why is not None:
        raise LostRayError(_why)
    raise KeyboardInterrupt


@contextmanager
def watched(close: Callable[[], None]) -> Iterator[None]:
    """Watch the connected Ray for the length of the block, and then `close` it. There is no watch in other threads than
    the main one, because a signal interrupts that one only."""
    global _why
    _why = None
    if threading.current_thread() is not threading.main_thread():
        try:
            yield
        finally:
            close()
        return
    watch = _Watch()
    threading.Thread(target=watch.look, name="ray-watch", daemon=True).start()
    try:
        yield
    except Exception as error:
        if _why is None or isinstance(error, LostRayError):
            raise
        raise LostRayError(_why) from error  # code of Ray that is interrupted may raise SystemError instead
    finally:
        with watch.judging:  # from here on a daemon ends because it was asked to
            watch.leaving.set()
        try:
            close()
        finally:
            watch.closed.set()


def end(why: str) -> None:
    """Say why this command has to end, and interrupt its main thread, which then raises LostRayError."""
    global _why
    _why = why
    say(f"ckd-ray: {why}", always=True)
    os.kill(os.getpid(), signal.SIGTERM)


class _Watch:
    def __init__(self) -> None:
        self.leaving, self.closed, self.judging = threading.Event(), threading.Event(), threading.Lock()

    def look(self) -> None:
        since = 0.0
        while not self.leaving.wait(_LOOK_S):
            since += _LOOK_S
            why = _ended_daemon() or (_dead_node() if since % _ASK_S < _LOOK_S else None)
            if why is None:
                continue
            with self.judging:
                if self.leaving.is_set():
                    return
                end(f"{why}; give {same_command()} again: what was finished is kept")
            if not self.closed.wait(PATIENCE_S):
                os._exit(1)
            return


def _ended_daemon() -> str | None:
    """For a Ray that this process has started: the raylet and the GCS are its children."""
    from ray._private import worker

    node: Any = worker._global_node
    for kind in ("raylet", "gcs_server"):
        for info in getattr(node, "all_processes", {}).get(kind, []):
            code = info.process.poll()
            if code is not None:
                return (
                    f"Ray's daemon on this machine ({kind}) has ended (status {code}): it was killed, or lacked memory"
                )
    return None


def _dead_node() -> str | None:
    """For a Ray that was joined: what the head says of this machine."""
    import ray

    try:
        mine = ray.get_runtime_context().get_node_id()
        dead = any(node["NodeID"] == mine and not node["Alive"] for node in ray.nodes())
    except Exception:  # the head does not answer, or Ray is shutting down: that decides nothing
        return None
    return "Ray has declared the node of this machine dead" if dead else None
