"""Ray's cluster launcher, called in this process: start, end, SSH to the head, and files from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from ckd_ray.errors import JobError, UserError
from ckd_ray.jobs.launcher_file import LauncherFile
from ckd_ray.jobs.placeholders import check_launcher_filled_in
from ckd_ray.progress import say
from ckd_ray.ray_util.token import demand_token, ensure_token
from ckd_ray.streams import log_path, only_ours

_SHOWN_LINES = 25


def use_launcher_s_token(launcher: LauncherFile) -> None:
    """Make sure that the file which the launcher copies to the machines holds a token, and use that token here.

    Call it before Ray opens a connection.
    """
    demand_token()  # a check of the launcher's file has imported Ray
    source = launcher.token_source
    if source is None:  # the machines get the token in another way; this machine uses the user's own
        return
    if ensure_token(source):
        say(f"made a new token for the cluster: {source}")
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(source)
    os.environ.pop("RAY_AUTH_TOKEN", None)


def head_address(launcher: LauncherFile) -> str | None:
    """The address of the running head, or None when the cluster is not up."""
    from ray.autoscaler.sdk import get_head_node_ip

    with _launcher_errors(launcher):
        try:
            return str(get_head_node_ip(launcher.path))
        except RuntimeError:
            return None


def check_can_launch(launcher: LauncherFile) -> None:
    """Check this machine and the file, without a request to the cloud.

    Raises:
        UserError: a tool is missing, or a value of the file is not filled in.
    """
    if shutil.which("rsync") is None or shutil.which("ssh") is None:
        raise UserError("the launcher needs ssh and rsync on this machine", where=launcher.path, fix="install them")
    check_launcher_filled_in(launcher.prepared, launcher.path)


def bring_up(launcher: LauncherFile) -> None:
    """Start the machines that do not run; a live head is not restarted. JobError when the launcher fails."""
    from ray.autoscaler.sdk import create_or_update_cluster

    with _launcher_errors(launcher):
        create_or_update_cluster(launcher.path, no_restart=True)


def take_down(launcher: LauncherFile) -> None:
    """End all machines of the cluster, or Ray on the user's own machines. JobError when the launcher fails."""
    from ray.autoscaler.sdk import teardown_cluster

    with _launcher_errors(launcher):
        teardown_cluster(launcher.path)


def ssh_command(launcher: LauncherFile) -> list[str]:
    """`ssh ... user@head`, with the options that the launcher uses."""
    from ray.autoscaler._private.command_runner import SSHOptions
    from ray.autoscaler._private.commands import _bootstrap_config

    with _launcher_errors(launcher):  # adds what only the cloud knows (the name of the key)
        auth = _bootstrap_config(yaml.safe_load(Path(launcher.path).read_text(encoding="utf-8")))["auth"]
    address = head_address(launcher)
    if address is None:
        raise ConnectionError("the head is not running")
    options = SSHOptions(auth.get("ssh_private_key"), None, ProxyCommand=auth.get("ssh_proxy_command"))
    key = [os.path.expanduser(part) for part in options.to_ssh_options_list(timeout=15)]
    return ["ssh", *key, f"{auth['ssh_user']}@{address}"]


def fetch(launcher: LauncherFile, source: str, target: Path) -> bool:
    """Copy the file `source` of the head to `target`, or the contents of the folder `source/`. False when there is no
    such file."""
    from ray.autoscaler.sdk import rsync

    folder = source.endswith("/")
    (target if folder else target.parent).mkdir(parents=True, exist_ok=True)
    try:
        with _launcher_errors(launcher, shown=0):
            rsync(launcher.path, source=source, target=f"{target}/" if folder else str(target), down=True)
    except JobError:
        return False
    return True


@contextmanager
def _launcher_errors(launcher: LauncherFile, *, shown: int = _SHOWN_LINES) -> Iterator[None]:
    """What the launcher and its children print goes to the log, and its last lines are shown when the launcher fails.
    Its errors become ours, and its ways to end the process do not end this one."""
    import click

    def failed(reason: str) -> JobError:
        log = log_path()
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log else []
        for line in lines[-shown:] if shown else []:
            say(f"  | {line}")
        return JobError(f"the launcher failed: {reason.strip()}")

    if launcher.own_machines:  # Ray's second autoscaler never starts the workers of such a cluster
        os.environ["RAY_UP_enable_autoscaler_v2"] = "0"  # noqa: SIM112  (Ray spells it so)
    try:
        with only_ours():
            yield
    except (UserError, RuntimeError):  # JobError is one; another says that there is no head
        raise
    except click.ClickException as error:
        raise failed(error.format_message()) from error
    except SystemExit as error:
        raise failed(f"it ended with status {error.code}") from error
    except Exception as error:  # botocore's, googleapiclient's: each cloud has its own
        raise failed(f"{type(error).__name__}: {str(error).strip()[:500]}") from error
