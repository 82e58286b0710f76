"""Is the Ray of this process still there? Nobody else says so: when the daemon of its machine (raylet) is gone, a call
that waits for Ray waits for ever.

A thread looks once a second. It says what it has found, at once: Ray ends a process without a word, status 1, when it
misses its object store. Then it ends the wait by SIGTERM, whose handler (`cli`) raises what `lost` says; should that
not end the process within a minute, the thread does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ckd_ray.ray_util.again import same_command

_LOOK_S, _ASK_S, _PATIENCE_S = 1.0, 10.0, 60.0
_why: str | None = None


def lost() -> str | None:
    """Why this process has no Ray any more; None while it has."""
    return _why


@contextmanager
def watched(close: Callable[[], None]) -> Iterator[None]:
    """Look after the Ray that is connected, for the length of the block, and then `close` it. The signal goes to the
    main thread; in another one there is no watch."""
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
    finally:
        with watch.judging:  # a daemon that ends from here on was told to
            watch.leaving.set()
        try:
            close()
        finally:
            watch.closed.set()


class _Watch:
    def __init__(self) -> None:
        self.leaving, self.closed, self.judging = threading.Event(), threading.Event(), threading.Lock()

    def look(self) -> None:
        global _why
        since = 0.0
        while not self.leaving.wait(_LOOK_S):
            since += _LOOK_S
            why = _ended_daemon() or (_dead_node() if since % _ASK_S < _LOOK_S else None)
            if why is None:
                continue
            with self.judging:
                if self.leaving.is_set():
                    return
                _why = f"{why}; give {same_command()} again: what was finished is kept"
                print(f"ckd-ray: {_why}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
            if not self.closed.wait(_PATIENCE_S):
                os._exit(1)
            return


def _ended_daemon() -> str | None:
    """Of a Ray that this process has started: the raylet and the GCS are its children."""
    from ray._private import worker

    node: Any = worker._global_node
    for kind in ("raylet", "gcs_server"):
        for info in getattr(node, "all_processes", {}).get(kind, []):
            code = info.process.poll()
            if code is not None:
                return f"Ray's daemon on this machine ({kind}) has ended (status {code}), killed or for want of memory"
    return None


def _dead_node() -> str | None:
    """Of a Ray that was joined: what the head says of this machine."""
    import ray

    try:
        mine = ray.get_runtime_context().get_node_id()
        dead = any(node["NodeID"] == mine and not node["Alive"] for node in ray.nodes())
    except Exception:  # the head does not answer, or Ray is being shut down: not for us to judge
        return None
    return "Ray calls the node of this machine dead" if dead else None
