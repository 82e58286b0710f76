"""Ray's cluster launcher, called in this process: up, down, the way in, and files home."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import yaml

from ckd_ray.errors import JobError, UserError
from ckd_ray.jobs.aws import prepare_account
from ckd_ray.jobs.launcher_file import LauncherFile
from ckd_ray.jobs.placeholders import check_launcher_filled_in
from ckd_ray.progress import say
from ckd_ray.ray_util.token import ensure_token

_SHOWN_LINES = 25


def use_launcher_s_token(launcher: LauncherFile) -> None:
    """Make sure that the file which the launcher copies to the machines holds a token, and use that one here.

    To be called before anything of Ray's opens a connection.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    source = launcher.token_source
    if source is None:  # the machines get theirs in another way; here it is this user's own
        return
    if ensure_token(source):
        say(f"made a new token for the cluster: {source}")
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(source)
    os.environ.pop("RAY_AUTH_TOKEN", None)


def head_address(launcher: LauncherFile) -> str | None:
    """The address of the running head, or None when the cluster is not up."""
    from ray.autoscaler.sdk import get_head_node_ip

    with _spoken(launcher):
        try:
            return str(get_head_node_ip(launcher.path))
        except RuntimeError:
            return None


def worker_addresses(launcher: LauncherFile) -> list[str]:
    """The addresses of the workers that the launcher knows of."""
    from ray.autoscaler.sdk import get_worker_node_ips

    with _spoken(launcher):
        return [str(ip) for ip in get_worker_node_ips(launcher.path)]


def check_can_launch(launcher: LauncherFile) -> None:
    """Whether this machine and the file are ready; asks nobody, starts nothing.

    Raises:
        UserError: a tool is missing, or a value of the file is still to be filled in.
    """
    if shutil.which("rsync") is None or shutil.which("ssh") is None:
        raise UserError("the launcher needs ssh and rsync on this machine", where=launcher.path, fix="install them")
    check_launcher_filled_in(launcher.prepared, launcher.path)


def prepare_cloud(launcher: LauncherFile) -> None:
    """What has to be right in the cloud before a machine starts; no machine is there yet.

    Raises:
        UserError, JobError: as `prepare_account` does.
    """
    for line in prepare_account(launcher.prepared):
        say(line)


def bring_up(launcher: LauncherFile) -> None:
    """Start what is not running; a live head is left alone.

    Raises:
        JobError: the launcher gave up.
    """
    from ray.autoscaler.sdk import create_or_update_cluster

    with _spoken(launcher):
        create_or_update_cluster(launcher.path, no_restart=True)


def take_down(launcher: LauncherFile) -> None:
    """End all machines of the cluster (of machines of one's own: Ray on them).

    Raises:
        JobError: the launcher gave up.
    """
    from ray.autoscaler.sdk import teardown_cluster

    with _spoken(launcher):
        teardown_cluster(launcher.path)


def ssh_command(launcher: LauncherFile) -> list[str]:
    """`ssh ... user@head`, as the launcher itself would call it."""
    from ray.autoscaler._private.command_runner import SSHOptions

    config = _bootstrapped(launcher)
    auth = config["auth"]
    address = head_address(launcher)
    if address is None:
        raise ConnectionError("the head is not running")
    options = SSHOptions(auth.get("ssh_private_key"), None, ProxyCommand=auth.get("ssh_proxy_command"))
    key = [os.path.expanduser(part) for part in options.to_ssh_options_list(timeout=15)]
    return ["ssh", *key, f"{auth['ssh_user']}@{address}"]


def fetch(launcher: LauncherFile, source: str, target: Path) -> bool:
    """Copy the file `source` of the head to `target`, or what is in it when it is a folder, with / at its end; False
    when it is not there."""
    from ray.autoscaler.sdk import rsync

    folder = source.endswith("/")
    (target if folder else target.parent).mkdir(parents=True, exist_ok=True)
    try:
        with _spoken(launcher, show_failure=False):
            rsync(launcher.path, source=source, target=f"{target}/" if folder else str(target), down=True)
    except JobError:
        return False
    return True


def _bootstrapped(launcher: LauncherFile) -> dict[str, Any]:
    """The configuration with what only the cloud knows (the name of the key); cached by Ray after the first time."""
    from ray.autoscaler._private.commands import _bootstrap_config

    with _spoken(launcher):
        found: dict[str, Any] = _bootstrap_config(yaml.safe_load(Path(launcher.path).read_text(encoding="utf-8")))
    return found


@contextmanager
def _spoken(launcher: LauncherFile, *, show_failure: bool = True) -> Iterator[None]:
    """What the launcher and its children print, pages of it, goes to a log, whose end is shown when it fails. Its own
    failures become ours; its many ways to end the process do not end this one."""

    def failed(reason: str) -> JobError:
        return _failed(launcher, reason, _SHOWN_LINES if show_failure else 0)

    import click

    if launcher.own_machines:  # under the second autoscaler Ray never starts the workers of such a cluster
        os.environ["RAY_UP_enable_autoscaler_v2"] = "0"  # noqa: SIM112  (Ray spells it so)
    try:
        with _printing_to(log_file(launcher)):
            yield
    except (UserError, RuntimeError):  # JobError is one; another says that there is no head
        raise
    except click.ClickException as error:
        raise failed(error.format_message()) from error
    except SystemExit as error:
        raise failed(f"it gave up with status {error.code}") from error
    except Exception as error:  # botocore's, googleapiclient's: each cloud has its own
        raise failed(f"{type(error).__name__}: {str(error).strip()[:500]}") from error


def _failed(launcher: LauncherFile, reason: str, shown: int) -> JobError:
    path = log_file(launcher)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines[-shown:] if shown else []:
        say(f"  | {line}")
    return JobError(f"the launcher failed: {reason.strip()}\n  (all that it said: {path})")


def log_file(launcher: LauncherFile) -> Path:
    """What the launcher has said in this process."""
    return Path(tempfile.gettempdir()) / f"ckd-ray-{launcher.prepared['cluster_name']}-{os.getpid()}.log"


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Both standard outputs, of this process and its children, are added to the file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    # Not followed if somebody has put a link there: the folder is everybody's.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        os.dup2(file, 1)
        os.dup2(file, 2)
        with open(file, "w", encoding="utf-8", closefd=False) as text, redirect_stdout(text):
            yield
    finally:
        sys.stderr.flush()
        for number, before in enumerate(kept, 1):
            os.dup2(before, number)
            os.close(before)
        os.close(file)


@contextmanager
def object_stream(quiet: bool = False) -> Iterator[TextIO]:
    """The standard output this process was started with, for one object. Until the block ends, all else that is printed
    there, by children too, goes to standard error (nowhere when `quiet`): the launcher runs ssh and rsync, which write
    to the descriptor itself."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as kept:
        other = os.open(os.devnull, os.O_WRONLY) if quiet else os.dup(2)
        os.dup2(other, 1)
        os.close(other)
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if quiet else sys.stderr):
                yield kept
        finally:
            kept.flush()
            os.dup2(kept.fileno(), 1)
