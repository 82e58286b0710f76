"""One command at a time in a run directory, on this machine and across machines that share its storage.

`RUN/.lock` says who holds the run. On a file system the holder also has an flock on it, which the kernel releases when
the process ends, whatever ends it; so on one machine a lock without flock is stale, and is taken over. On an object
store the process is looked up by its number and start time. Across machines nobody can ask whether a process lives: the
holder rewrites the lock twice a minute, and a lock that was not written for three minutes, by the clock of the storage,
is stale.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ckd_ray.errors import UserError, first_line
from ckd_ray.files import delete, filesystem_of, is_local, join, make_folder

LOCK = ".lock"
_HEARTBEAT_S, _STALE_S = 30.0, 180.0
# On an object store: for how long after a process has written its lock another process may still overwrite it.
_SETTLE_S = 1.0

Holder = dict[str, Any]


@contextmanager
def run_lock(run: str) -> Iterator[None]:
    """Hold the run while the block runs.

    Raises:
        UserError: another command holds it (says which, where and since when), or the folder cannot be written.
    """
    me: Holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "kernel": _kernel(),
        "pids": _pid_namespace(),
        "started": _started(os.getpid()),
        "token": uuid.uuid4().hex,
    }
    with _writable(run):
        make_folder(run)
        release = _hold_file(run, me) if is_local(run) else _hold_object(run, me)
    try:
        yield
    finally:
        release()


@contextmanager
def _writable(run: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # read-only, not ours, or no such bucket
        raise UserError(
            "the run directory cannot be written",
            where=run,
            found=first_line(error),
            fix="choose another run.storage, or see to its permissions",
        ) from error


def _kernel() -> str:
    """An id of this boot of this machine, which its containers share; empty where the system has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _pid_namespace() -> str:
    """The namespace in which the process numbers seen here are valid."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: Any) -> str | None:
    """When a process was started, in clock ticks since boot; None if there is no such process, or only a zombie."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    return None


def _is_dead(holder: Holder, me: Holder) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    here = all(me[key] and holder.get(key) == me[key] for key in ("kernel", "pids"))
    return here and _started(holder.get("pid")) != holder.get("started")


def _busy(run: str, holder: Holder, lock: str, age: float | None = None) -> UserError:
    since = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
    heard = "" if age is None else f", last heard of {max(0.0, age):.0f} s ago"
    later = "" if age is None else f" (it is taken over {_STALE_S:.0f} s after its last sign of life)"
    return UserError(
        "another ckd-ray works in this run",
        where=run,
        found=since + heard,
        fix=f"wait for it{later}, or choose another run.name; if it is surely gone, delete {lock}",
    )


def _hold_file(run: str, me: Holder) -> Callable[[], None]:
    """Take `RUN/.lock` of a file system; returns the call that releases it."""
    path = os.path.join(filesystem_of(run)[1], LOCK)
    while True:
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(fd)
            os.close(fd)
            raise _busy(run, holder, path) from None
        except OSError:  # a file system without locks: the contents of the file decide
            pass
        if _is_at(fd, path):
            break
        os.close(fd)  # its holder has released and removed it in between
    holder = _read(fd)
    age = _age(path) if holder and _may_live(holder, me) else _STALE_S
    if age < _STALE_S:
        os.close(fd)
        raise _busy(run, holder, path, age)
    _write(fd, me)
    stop = _start_heartbeat(lambda: os.utime(fd))

    def release() -> None:
        stop()
        if _read(fd).get("token") == me["token"] and _is_at(fd, path):
            os.remove(path)
        os.close(fd)

    return release


def _is_at(fd: int, path: str) -> bool:
    """Whether the open file is still the one at that path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False


def _may_live(holder: Holder, me: Holder) -> bool:
    """Whether the holder may be alive although no process here has the flock.

    A process of this machine would have it. That of another machine may be invisible: not all file systems share locks.
    """
    same_host, same_kernel = holder.get("host") == me["host"], holder.get("kernel") == me["kernel"]
    return not (same_host or (me["kernel"] and same_kernel))


def _read(fd: int) -> Holder:
    """The contents of a lock; empty when it was not written completely."""
    try:
        value = json.loads(os.pread(fd, 65536, 0))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(fd: int, me: Holder) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(me).encode(), 0)


def _age(path: str) -> float:
    """Seconds since the file was written, by the clock of its file system."""
    probe = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
    with open(probe, "xb"):
        now = os.stat(probe).st_mtime
    os.remove(probe)
    return now - os.stat(path).st_mtime


def _hold_object(run: str, me: Holder) -> Callable[[], None]:
    """Take `RUN/.lock` of an object store, which can only be written and read back: two commands that start within a
    second of one another both see whose lock has stayed. If both go on all the same, they waste work at worst: stages
    write the same files, each of them atomically."""
    uri = join(run, LOCK)
    holder, age = _read_object(uri)
    if holder and age < _STALE_S and not _is_dead(holder, me):
        raise _busy(run, holder, uri, age)
    _write_object(uri, me)
    time.sleep(_SETTLE_S)
    holder, _ = _read_object(uri)
    if holder.get("token") != me["token"]:
        raise _busy(run, holder, uri)
    stop = _start_heartbeat(lambda: _write_object(uri, me))

    def release() -> None:
        stop()
        if _read_object(uri)[0].get("token") == me["token"]:
            delete(uri)

    return release


def _read_object(uri: str) -> tuple[Holder, float]:
    """Who holds the lock, and how many seconds ago it was written, by the clock of the storage."""
    fs, path = filesystem_of(uri)
    try:
        with fs.open_input_stream(path) as stream:
            value = json.loads(stream.read())
    except (FileNotFoundError, ValueError):
        return {}, 0.0
    probe = f"{path}.probe-{uuid.uuid4().hex[:8]}"
    with fs.open_output_stream(probe) as out:
        out.write(b"x")
    now, written = (info.mtime_ns or 0 for info in fs.get_file_info([probe, path]))
    fs.delete_file(probe)
    return (value if isinstance(value, dict) else {}), (now - written) / 1e9


def _write_object(uri: str, me: Holder) -> None:
    fs, path = filesystem_of(uri)
    with fs.open_output_stream(path) as out:
        out.write(json.dumps(me).encode())


def _start_heartbeat(beat: Callable[[], None]) -> Callable[[], None]:
    """Call `beat` every half minute in a thread; returns the call that ends the thread."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_HEARTBEAT_S):
            with suppress(OSError):  # the next one may succeed
                beat()

    thread = threading.Thread(target=follow, name="run-lock", daemon=True)
    thread.start()

    def stop() -> None:
        ended.set()
        thread.join(timeout=10)

    return stop
