"""Watches for the loss of Ray: without the daemon of this machine (raylet), a call that waits for Ray never returns.

A thread looks once a second. It prints a loss at once, because Ray may end the process with status 1 and no message.
Then it sends SIGTERM, whose handler (`terminate`) raises what `lost` returns. If the process has not ended
after a minute, the thread ends it. An error that a loss causes before the thread has looked is reported as a loss.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ckd_ray.errors import LostRayError, UserError
from ckd_ray.progress import duration, say
from ckd_ray.ray_util.again import same_command
from ckd_ray.ray_util.sockets import knock

_LOOK_S, _ASK_S = 1.0, 10.0
PATIENCE_S = 60.0
# Ray ends a process whose head has not answered for this long (60 s by default), and says so in its log alone.
_RAYS_LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"
_SILENCE_S = float(os.environ.get(_RAYS_LIMIT) or 60) * 2 / 3
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
    the main one, because a signal interrupts that one only.

    Raises:
        LostRayError: the block has failed, and Ray is lost.
    """
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
    except LostRayError:
        raise
    except UserError as error:
        if _why is not None:  # the loss has interrupted what reads the user's input
            raise LostRayError(_why) from error
        raise
    except Exception as error:
        if watch.is_lost():
            raise LostRayError(_why) from error
        raise
    finally:
        with watch.judging:  # from here on a daemon ends because it was asked to
            watch.leaving.set()
        try:
            close()
        finally:
            watch.closed.set()


class _Watch:
    def __init__(self) -> None:
        self.leaving, self.closed, self.judging = threading.Event(), threading.Event(), threading.Lock()
        self._raylet = _joined_raylet()
        self._silent_since: float | None = None

    def look(self) -> None:
        """Until Ray is lost or the block is left."""
        since = 0.0
        while not self.leaving.wait(_LOOK_S):
            since += _LOOK_S
            why = self._ended() or (self._of_the_head() if since % _ASK_S < _LOOK_S else None)
            if why is None:
                continue
            with self.judging:
                if not self.leaving.is_set() and _why is None:
                    end(_with_advice(why))
            break
        if _why is not None and not self.closed.wait(PATIENCE_S):
            os._exit(1)

    def is_lost(self) -> bool:
        """Whether Ray is lost at this moment; tells it, once."""
        with self.judging:
            if _why is None and (why := self._ended()):
                _tell(_with_advice(why))
            return _why is not None

    def _ended(self) -> str | None:
        """What can be seen on this machine."""
        if self._raylet is not None and not _is_raylet(*self._raylet):
            return "Ray's daemon on this machine (raylet) has ended: it was killed, lacked memory, or was stopped"
        return _ended_daemon()

    def _of_the_head(self) -> str | None:
        """What the head says of this machine, if it says anything. (A request to a head that has ended would wait as
        long as Ray lets this process live.)"""
        address = head_address()
        try:
            if address is not None:
                knock(address)
        except OSError:
            now = time.monotonic()
            self._silent_since = self._silent_since or now
            silent = now - self._silent_since
            return f"Ray's head at {address} has not answered for {duration(silent)}" if silent > _SILENCE_S else None
        self._silent_since = None
        return _dead_node()


def end(why: str) -> None:
    """Say why this command has to end, and interrupt its main thread, which then raises LostRayError."""
    _tell(why)
    os.kill(os.getpid(), signal.SIGTERM)


def _tell(why: str) -> None:
    global _why
    _why = why
    say(f"ckd-ray: {why}", always=True)


def _with_advice(why: str) -> str:
    return f"{why}; give {same_command()} again: what was finished is kept"


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


def _joined_raylet() -> tuple[int, str] | None:
    """Of a Ray that was joined: the raylet of this machine as its number and its socket; None where it is not seen."""
    from ray._private import worker

    node: Any = worker._global_node
    if node is None or getattr(node, "all_processes", {}).get("raylet"):
        return None
    socket = str(node.raylet_socket_name)
    for entry in Path("/proc").glob("[0-9]*"):
        if _is_raylet(int(entry.name), socket):
            return int(entry.name), socket
    return None


def _is_raylet(number: int, socket: str) -> bool:
    with suppress(OSError):
        words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")  # a dead process has none
        return os.path.basename(words[0]) == b"raylet" and any(word.endswith(socket.encode()) for word in words[1:])
    return False


def head_address() -> str | None:
    """The address of the head's GCS; None without a Ray."""
    from ray._private import worker

    node: Any = worker._global_node
    return None if node is None else str(node.gcs_address)


def _dead_node() -> str | None:
    """For a Ray that was joined: what the head says of this machine."""
    import ray

    try:
        mine = ray.get_runtime_context().get_node_id()
        dead = any(node["NodeID"] == mine and not node["Alive"] for node in ray.nodes())
    except Exception:  # the head does not answer, or Ray is shutting down: that decides nothing
        return None
    return "Ray has declared the node of this machine dead" if dead else None
