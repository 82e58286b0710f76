"""Where Ray comes from: a running cluster, an address, or a fresh one inside this process."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ckd_ray.cluster.watch import watched
from ckd_ray.errors import JobError, UserError
from ckd_ray.progress import say

# Blocks that travel through the object store are token ids of a few shards; embeddings never do. A small store is
# enough, and leaves the memory to the encoders.
_LOCAL_OBJECT_STORE = 512 * 2**20


@contextmanager
def connected(target: str | None) -> Iterator[None]:
    """Ray for the length of the block.

    Args:
        target: None joins a running Ray (RAY_ADDRESS, or the one on this machine) and else starts one in place;
            `local` always starts one; anything else is a Ray address.

    Raises:
        UserError: the address cannot be reached, or refuses our token.
    """
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    use_token()
    import ray

    _start(target)
    with watched():
        try:
            _quiet_data()
            _keep_token_private()
            yield
        finally:
            ray.shutdown()


def use_token() -> None:
    """Switch token authentication on where there is a token; to be called before Ray is first imported.

    Joining does not switch it on by itself, while a head that finds a token demands it; a head without authentication
    does not mind.
    """
    if _token_file().exists() or os.environ.get("RAY_AUTH_TOKEN"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _keep_token_private() -> None:
    """Ray writes the token so that everybody on the machine can read it."""
    with suppress(OSError):
        if _token_file().stat().st_mode & 0o077:
            _token_file().chmod(0o600)


def _start(target: str | None) -> None:
    import ray
    from ray._private.utils import read_ray_address

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if (target is not None and target.startswith(("http://", "https://"))) or (target or "").endswith(
        (".yaml", ".yml")
    ):
        raise UserError(
            "jobs cannot be sent to another machine yet",
            where="--cluster",
            expected="local, a Ray address (HOST:PORT), or nothing",
            found=str(target),
            fix="start the command on the head node, or pass its Ray address",
        )
    if target is None and not os.environ.get("RAY_ADDRESS"):
        try:
            _reach(read_ray_address() or "")
            ray.init(address="auto", **quiet)
            say(f"joined the running Ray ({_size()})")
            return
        except OSError:  # none, or one whose head is gone without having said so: Ray would wait minutes for it
            target = "local"
    if target == "local":
        os.environ.pop("RAY_ADDRESS", None)
        try:
            ray.init(address="local", object_store_memory=_LOCAL_OBJECT_STORE, include_dashboard=False, **quiet)
        except Exception as error:  # a start that takes too long is a plain Exception
            raise JobError(f"Ray did not start here: {error}") from error
        say(f"started Ray in place ({_size()})")
        return
    address = target or os.environ["RAY_ADDRESS"]
    try:
        _reach(address)
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:  # OSError holds ConnectionError and TimeoutError
        raise UserError(
            "this Ray cannot be joined",
            where="--cluster" if target else "RAY_ADDRESS",
            expected="the address of a running head node (HOST:6379)",
            found=f"{address}: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            fix="check that the head runs and that both sides hold the same token (RAY_AUTH_TOKEN, ~/.ray/auth_token)",
        ) from error
    say(f"joined Ray at {address} ({_size()})")


def _reach(address: str) -> None:
    """Knock first: Ray itself waits for minutes where nobody answers. `auto` and ray:// addresses are left to Ray."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=5).close()


def _size() -> str:
    import ray

    have = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    gpus = f", {have['GPU']:g} GPU" if have.get("GPU") else ""
    return f"{nodes} node{'s' if nodes > 1 else ''}, {have.get('CPU', 0):g} CPU{gpus}"


def _quiet_data() -> None:
    """Our own progress lines replace Ray Data's bars and plan print-outs; our own errors come back as what they are."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.issue_detectors_config.detectors = []
