"""Connect to Ray: a running one, an address, or a new one of this process."""

from __future__ import annotations

import copy
import fcntl
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ckd_ray.errors import JobError, UserError, first_line
from ckd_ray.progress import say
from ckd_ray.ray_util.sockets import knock
from ckd_ray.ray_util.token import has_token, keep_private, use_token
from ckd_ray.ray_util.watch import watched
from ckd_ray.streams import is_redirected, may_colour

# The object store holds token ids of a few shards, and never embeddings. A small store leaves memory to the encoders.
_LOCAL_OBJECT_STORE = 512 * 2**20
# How long a head may take to answer: a busy machine takes a while, a process that is stopped never answers.
_ANSWER_S = 60.0
_TRY_S = 5.0


@contextmanager
def connected(target: str | None) -> Iterator[None]:
    """Ray for the length of the block.

    Args:
        target: None takes the Ray that this process is connected to (and leaves it connected), else joins a running one
            (RAY_ADDRESS, or the one on this machine), else starts one in place; `local` always starts one; anything
            else is a Ray address.

    Raises:
        UserError: the address cannot be reached, or refuses our token; or the process is connected to another Ray.
    """
    known = sys.modules.get("ray")
    if known is not None and known.is_initialized():
        with _of_the_caller(target):
            yield
        return
    if not may_colour(sys.stderr):
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    quiet: dict[str, Any] = {}
    if not is_redirected():  # nothing else keeps Ray's lines away from ours
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")  # at ERROR it shows tracebacks
    use_token()
    import ray

    _start(target, quiet)
    with watched(ray.shutdown):
        _quiet_data()
        keep_private()
        yield


@contextmanager
def _of_the_caller(target: str | None) -> Iterator[None]:
    """A Ray that the process was connected to before, in a notebook or a program; it stays as it was."""
    import ray
    from ray.data import DataContext

    if target is not None:
        raise UserError(
            "this process is connected to a Ray already",
            where="cluster",
            expected="no value, which takes that Ray",
            found=target,
            fix="leave it out, or call ray.shutdown() first",
        )
    say(f"the Ray of this process ({_size()})")
    before = copy.deepcopy(DataContext.get_current())
    _quiet_data()
    try:
        with watched(lambda: None):
            yield
    finally:
        if ray.is_initialized():
            DataContext._set_current(before)


def _start(target: str | None, options: dict[str, Any]) -> None:
    import ray
    from ray._private.utils import read_ray_address

    if target is None and not os.environ.get("RAY_ADDRESS"):
        # The address that `ray start` has noted. "auto" would take any Ray on this machine, even one that another
        # command has started for itself and will end.
        noted = read_ray_address()
        try:
            if not noted:
                raise ConnectionError("no Ray is noted on this machine")
            _reach(noted, "this machine's Ray")
            ray.init(address=noted, **options)
            say(f"joined the running Ray ({_size()})")
            return
        except OSError:  # there is none, or its head has died, for which Ray would wait minutes
            target = "local"
    if target == "local":
        os.environ.pop("RAY_ADDRESS", None)
        # Ray ends a worker that is idle for a second; another one takes five seconds of a core to load its modules.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
        # This machine is not preempted, so training needs no process that watches for preemption.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        with _one_start_at_a_time():
            running = read_ray_address()
            try:
                ray.init(address="local", object_store_memory=_LOCAL_OBJECT_STORE, include_dashboard=False, **options)
            except Exception as error:  # a start that takes too long is a plain Exception
                raise JobError(f"Ray did not start here: {error}") from error
            _let_others_find(running)
        say(f"started Ray in place ({_size()})")
        return
    address = target or os.environ["RAY_ADDRESS"]
    try:
        _reach(address, "--cluster" if target else "RAY_ADDRESS")
        ray.init(address=address, **options)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # OSError holds ConnectionError and TimeoutError
        raise UserError(
            "this Ray cannot be joined",
            where="--cluster" if target else "RAY_ADDRESS",
            expected="the address of a running head node (HOST:6379)",
            found=f"{address}: {first_line(error)}",
            fix="check that the head runs and that both sides hold the same token (RAY_AUTH_TOKEN, ~/.ray/auth_token);"
            " --cluster local starts a Ray of your own",
        ) from error
    say(f"joined Ray at {address} ({_size()})")


@contextmanager
def _one_start_at_a_time() -> Iterator[None]:
    """Let one command of a user start Ray at a time. Otherwise a command could read the note of another, and restore it
    after the other has removed it. The wait has a limit, because the other command may be stopped. Without a lock file,
    commands do not wait for one another."""
    path = os.path.join(tempfile.gettempdir(), f"ckd-ray-start-{os.getuid()}.lock")
    try:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield
        return
    with open(opened, "wb") as lock:
        until = time.monotonic() + _ANSWER_S
        while time.monotonic() < until:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


def _let_others_find(running: str | None) -> None:
    """Restore the note of this machine's Ray to `running`, the one that was noted before, or remove it. Ray notes its
    latest start, and other commands would join this Ray, which ends with this process."""
    from ray._private.utils import get_ray_address_file, write_ray_address

    if running:
        write_ray_address(running)
    else:
        with suppress(OSError):
            os.remove(get_ray_address_file(None))


def _reach(address: str, where: str) -> None:
    """Try the address: Ray would wait for minutes where nothing answers, and its error does not name the token. `auto`
    and ray:// addresses are left to Ray.

    Raises:
        UserError: the head refuses our token, or does not answer within a minute.
        OSError: nothing listens there, or no Ray head.
    """
    if knock(address) and _refused(address, where):
        raise UserError(
            "this Ray asks for a token, and refuses ours" if has_token() else "this Ray asks for a token",
            where=where,
            expected="the token that its head was started with",
            found=address,
            fix="put it into ~/.ray/auth_token (mode 0600) or RAY_AUTH_TOKEN; --cluster local starts a Ray of your own",
        )


def _refused(address: str, where: str) -> bool:
    """Whether the head refuses our token, in a request like Ray's first one."""
    try:
        import grpc
        from ray._private.grpc_utils import init_grpc_channel
    except ImportError:  # Ray without its extra `default`; ray.init finds out, but takes longer
        return False
    from ray.exceptions import AuthenticationError

    tries = max(1, round(_ANSWER_S / _TRY_S))
    for number in range(tries):
        try:
            with init_grpc_channel(address) as channel:
                channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=_TRY_S)
            return False
        except AuthenticationError:
            return True
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise ConnectionError("what listens there does not answer as the head of a Ray does") from None
            if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
                return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
        if number == 0:
            say(f"the Ray at {address} does not answer; waiting for {_ANSWER_S:.0f} s")
    raise UserError(
        "this Ray does not answer",
        where=where,
        expected=f"an answer of its head within {_ANSWER_S:.0f} s",
        found=address,
        fix="see whether its head is stopped or its machine overloaded; --cluster local starts a Ray of your own",
    )


def _size() -> str:
    import ray

    have = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    gpus = f", {have['GPU']:g} GPU" if have.get("GPU") else ""
    return f"{nodes} node{'s' if nodes > 1 else ''}, {have.get('CPU', 0):g} CPU{gpus}"


def _quiet_data() -> None:
    """Our progress lines replace Ray Data's; our errors keep their type."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.issue_detectors_config.detectors = []
