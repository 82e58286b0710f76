"""One run directory, one command at a time."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ckd_ray.errors import UserError
from ckd_ray.store.files import filesystem_of, is_local, make_folder


@contextmanager
def run_lock(run: str) -> Iterator[None]:
    """Hold `run/.lock` for the length of the block; the lock of a process that is gone is taken over.

    Raises:
        UserError: another live process holds the run.
    """
    make_folder(run)
    if not is_local(run):
        # Object stores have no exclusive create in pyarrow. Shards are idempotent, so two commands waste work at worst.
        yield
        return
    path = os.path.join(filesystem_of(run)[1], ".lock")
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    for _ in range(2):
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w") as file:
                json.dump(mine, file)
            break
        except FileExistsError:
            holder = _holder(path)
            if _alive(holder):
                raise UserError(
                    "another ckd-ray works in this run",
                    where=run,
                    found=f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}",
                    fix=f"wait for it, or choose another run.name; if it is surely gone, delete {path}",
                ) from None
            with suppress(FileNotFoundError):
                os.remove(path)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.remove(path)


def _holder(path: str) -> dict[str, object]:
    try:
        with open(path) as file:
            value = json.load(file)
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def _alive(holder: dict[str, object]) -> bool:
    if holder.get("host") != socket.gethostname():
        return bool(holder)  # another machine's process cannot be asked
    try:
        os.kill(int(str(holder["pid"])), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except PermissionError:
        return True
    return True
