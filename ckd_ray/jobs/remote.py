"""A command that runs on a cluster: start the cluster if need be, send the job, follow it, fetch the results."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from ckd_ray.config import Config
from ckd_ray.errors import JobError, UserError
from ckd_ray.jobs import launcher as ray_launcher
from ckd_ray.jobs.aws import prepare_account
from ckd_ray.jobs.bundle import check_for_job
from ckd_ray.jobs.changes import account_changes, show_changes
from ckd_ray.jobs.confirm import confirmed
from ckd_ray.jobs.follow import Outcome, follow
from ckd_ray.jobs.home import bring_home
from ckd_ray.jobs.launcher_file import LauncherFile, describe, read_launcher_file, warnings
from ckd_ray.jobs.submit import JobRequest, Jobs, running, which
from ckd_ray.jobs.tunnel import Tunnel
from ckd_ray.progress import say
from ckd_ray.ray_util.machines import RESOURCES_VARIABLE, parse_resources
from ckd_ray.ray_util.target import Target
from ckd_ray.ray_util.token import use_token
from ckd_ray.streams import log_path

_DASHBOARD_WITHIN_S = 120.0


@dataclass(frozen=True)
class ClusterOptions:
    """`--yes`, `--down`, `--keep`, `--detach` and `--dry-run`, which every command with `--cluster` has."""

    yes: bool = False
    down: bool = False
    keep: bool = False
    detach: bool = False
    dry_run: bool = False

    def check(self, target: Target | None) -> None:
        """UserError where they contradict each other or the target."""
        if self.down and self.keep:
            raise UserError("--down and --keep contradict each other", where="--down")
        if self.detach and self.down:
            raise UserError(
                "after --detach, no process waits for the job to take the cluster down",
                where="--detach --down",
                fix="leave one out; `ckd-ray attach TARGET --down` follows the job later and takes the cluster down",
            )
        if (self.down or self.keep or self.dry_run) and (target is None or target.kind != "launcher"):
            where = "--dry-run" if self.dry_run else "--down, --keep"
            raise UserError("this is for a cluster that ckd-ray starts from a YAML", where=where)
        if self.detach and (target is None or not target.remote):
            raise UserError("there is no job to detach from: the command runs in this process", where="--detach")


@dataclass(frozen=True)
class Command:
    """`ckd-ray NAME WORDS...` with its configuration; `arguments` has the values of the options by name."""

    name: str
    words: list[str]
    arguments: dict[str, Any]
    config: Config


def run_remote(target: Target, command: Command, options: ClusterOptions, objects: TextIO) -> int:
    """Run the command on the target. Returns the job's exit status.

    Args:
        objects: where the one object of `--json` goes.

    Raises:
        UserError: the cluster or the configuration cannot be used; nothing has started.
        JobError: the launcher failed, or the cluster is lost.
    """
    parse_resources(os.environ.get(RESOURCES_VARIABLE, ""))  # the job gets it
    if target.kind == "dashboard":
        check_for_job(command.config, command.arguments, None)
        with dashboard(target) as jobs:
            request = JobRequest(command.name, command.words, command.config)
            return _submitted(jobs, request, target, options, objects).status
    launcher = read_launcher_file(target.text)
    ray_launcher.check_can_launch(launcher)
    check_for_job(command.config, command.arguments, launcher)
    request = JobRequest(command.name, command.words, command.config, launcher.least_nodes)
    _say_all([*describe(launcher), *(f"warning: {text}" for text in warnings(launcher))])
    changes = account_changes(launcher, command.config.run.storage)
    if options.dry_run:
        if "--json" in command.words:
            found = {"cluster": launcher.path, "changes": [asdict(change) for change in changes]}
            print(json.dumps(found), file=objects, flush=True)
        _say_all([*show_changes(launcher, changes), "dry run: nothing was started, changed or asked of the account"])
        return 0
    ray_launcher.use_launcher_s_token(launcher)
    head = ray_launcher.head_address(launcher)
    if head is not None:
        say(f"the cluster is up, head {head}")
    elif not _agreed(show_changes(launcher, changes), options.yes):
        raise UserError("nothing was started or changed")
    else:  # before `work`: if it fails, there is no cluster to take down or to warn of
        for line in prepare_account(launcher.prepared):
            say(line)

    def work() -> Outcome:
        if head is None:
            say(f"starting the cluster, which takes minutes (log: {log_path() or 'below'})")
            ray_launcher.bring_up(launcher)
        with through_ssh(launcher) as jobs:
            outcome = _submitted(jobs, request, target, options, objects)
        if outcome.status == 0 and not outcome.detached:
            bring_home(launcher, request.command, request.run)
        return outcome

    return _then_end(launcher, options.down, work).status


def _agreed(changes: list[str], yes: bool) -> bool:
    _say_all(changes, always=not yes)  # nobody agrees to what --quiet has hidden
    return confirmed("make these changes and start this cluster?", yes)


def _say_all(lines: list[str], always: bool = False) -> None:
    for line in lines:
        say(line, always=always)


def attach(target: Target, job: str | None, down: bool, objects: TextIO | None) -> int:
    """Follow a job that was sent before, the newest for None. Returns its exit status."""
    if target.kind == "dashboard":
        with dashboard(target) as jobs:
            chosen = which(jobs, job)
            return follow(jobs, chosen, reattach(target, chosen), objects).status
    launcher = read_launcher_file(target.text, strict=False)
    ray_launcher.use_launcher_s_token(launcher)
    if ray_launcher.head_address(launcher) is None:
        fix = f"a job with --cluster {target.text} starts it"
        raise UserError("this cluster is not up", where=target.text, fix=fix)

    def work() -> Outcome:
        with through_ssh(launcher) as jobs:
            chosen = which(jobs, job)
            outcome = follow(jobs, chosen, reattach(target, chosen), objects)
            metadata = jobs.info(chosen).metadata or {} if outcome.status == 0 else {}
        if "run" in metadata:
            bring_home(launcher, str(metadata["command"]), str(metadata["run"]))
        return outcome

    return _then_end(launcher, down, work).status


def reattach(target: Target, job: str) -> str:
    """The command that follows the job again."""
    return shlex.join(["ckd-ray", "attach", target.text, job])


@contextmanager
def dashboard(target: Target) -> Iterator[Jobs]:
    """The jobs of the dashboard at an address.

    Raises:
        UserError: nothing answers there, or it refuses our token.
    """
    use_token()
    if target.in_clear:
        say(f"{target.text}: without https the token and the data travel unencrypted; an SSH tunnel encrypts them")
    jobs = Jobs(target.text, target.text)
    try:
        jobs.client()
    except ConnectionError as error:
        raise UserError(
            "no dashboard answers here",
            where=target.text,
            expected="the dashboard of a running head (http://HOST:8265)",
            found=str(error),
            fix="look at the address and port, and whether a tunnel that leads there is open",
        ) from error
    yield jobs


@contextmanager
def through_ssh(launcher: LauncherFile) -> Iterator[Jobs]:
    """The jobs of a launcher's cluster, through a tunnel. A head that has just started has two minutes to answer.

    Raises:
        JobError: it does not answer.
    """
    with Tunnel(ray_launcher.ssh_command(launcher)) as tunnel:
        jobs = Jobs(tunnel.address, launcher.path, tunnel.ensure)
        deadline = time.monotonic() + _DASHBOARD_WITHIN_S
        while True:
            try:
                jobs.client()
                break
            except ConnectionError as error:
                if time.monotonic() > deadline:
                    raise JobError(
                        f"the head of {launcher.path} runs, but its dashboard does not answer ({error}); if Ray has"
                        f" died there, run `ckd-ray down {shlex.quote(launcher.path)}` and start again"
                    ) from error
                time.sleep(2)
        yield jobs


def _submitted(jobs: Jobs, request: JobRequest, target: Target, options: ClusterOptions, objects: TextIO) -> Outcome:
    """Send the job, and follow it unless the options say `--detach`."""
    busy = running(jobs, request.run)
    if busy is not None:
        raise UserError(
            "a job of this run is already running there",
            where=request.run,
            found=busy,
            fix=reattach(target, busy),
        )
    job = request.new_id()
    again = reattach(target, job)
    for attempt in range(5):
        try:
            jobs.submit(request, job)
            break
        except ConnectionError as error:
            if attempt == 4:
                raise JobError(f"the job could not be sent: {error}") from error
            time.sleep(2**attempt)
        except KeyboardInterrupt:
            say(f"the job may have been sent already: {again}")
            raise
    say(f"job {job} on {target.text}; {again} follows it from anywhere")
    if options.detach:
        if "--json" in request.options:
            print(json.dumps({"job": job, "target": target.text, "attach": again}), file=objects, flush=True)
        return Outcome(0, detached=True)
    return follow(jobs, job, again, objects)


def _then_end(launcher: LauncherFile, down: bool, work: Callable[[], Outcome]) -> Outcome:
    """Do the work. Whatever happens to it, take the cluster down or say how the user can do that."""
    outcome: Outcome | None = None
    try:
        outcome = work()
        return outcome
    finally:
        left = outcome is not None and outcome.detached
        if down and not left:
            say("taking the cluster down")
            try:
                ray_launcher.take_down(launcher)
                say("the cluster is down")
            except BaseException:
                _still_up(launcher)
                raise
        else:
            _still_up(launcher)


def _still_up(launcher: LauncherFile) -> None:
    costs = "" if launcher.own_machines else " and costs money"
    say(f"THE CLUSTER IS STILL UP{costs}. Take it down with\n  ckd-ray down {shlex.quote(launcher.path)}")
