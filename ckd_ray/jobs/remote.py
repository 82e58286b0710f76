"""A command that runs on a cluster: bring it up if need be, send the job, follow it, bring the results home."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from ckd_ray.config import Config
from ckd_ray.errors import JobError, UserError
from ckd_ray.jobs import launcher as ray_launcher
from ckd_ray.jobs.bundle import check_for_job
from ckd_ray.jobs.confirm import confirmed
from ckd_ray.jobs.follow import Outcome, follow
from ckd_ray.jobs.home import bring_home
from ckd_ray.jobs.launcher_file import LauncherFile, describe, read_launcher_file, warnings
from ckd_ray.jobs.submit import JobRequest, Jobs, running, which
from ckd_ray.jobs.tunnel import Direct, Tunnel
from ckd_ray.progress import say
from ckd_ray.ray_util.target import Target
from ckd_ray.ray_util.token import use_token

_DASHBOARD_WITHIN_S = 120.0


@dataclass(frozen=True)
class ClusterOptions:
    """`--yes`, `--down`, `--keep`, `--detach`: what every command that takes `--cluster` offers."""

    yes: bool = False
    down: bool = False
    keep: bool = False
    detach: bool = False

    def check(self, target: Target | None) -> None:
        """Raises UserError where they contradict each other or the target."""
        if self.down and self.keep:
            raise UserError("--down and --keep contradict each other", where="--down")
        if self.detach and self.down:
            raise UserError(
                "nobody would be there to take the cluster down",
                where="--detach --down",
                fix="leave one out; `ckd-ray attach TARGET --down` follows the job later and takes the cluster down",
            )
        if (self.down or self.keep) and (target is None or target.kind != "launcher"):
            raise UserError("counts for a cluster that ckd-ray starts from a YAML", where="--down, --keep")
        if self.detach and (target is None or not target.remote):
            raise UserError("there is no job to leave: the command runs in this process", where="--detach")


@dataclass(frozen=True)
class Command:
    """`ckd-ray name words...` with its configuration; `arguments` are the options behind `words`, by name."""

    name: str
    words: list[str]
    arguments: dict[str, Any]
    config: Config


def run_remote(target: Target, command: Command, options: ClusterOptions, objects: TextIO) -> int:
    """Run the command on the target. Returns the job's exit status.

    Args:
        objects: where the one object of `--json` goes.

    Raises:
        UserError: the cluster or the configuration cannot be used; nothing was started.
        JobError: the launcher failed, or the cluster is gone.
    """
    if target.kind == "dashboard":
        check_for_job(command.config, command.arguments, None)
        with dashboard(target) as jobs:
            request = JobRequest(command.name, command.words, command.config)
            return _submitted(jobs, request, target, options, objects).status
    launcher = read_launcher_file(target.text)
    ray_launcher.check_can_launch(launcher)
    check_for_job(command.config, command.arguments, launcher)
    request = JobRequest(command.name, command.words, command.config, launcher.least_nodes)
    for line in [*describe(launcher), *(f"warning: {text}" for text in warnings(launcher))]:
        say(line)
    ray_launcher.use_launcher_s_token(launcher)
    head = ray_launcher.head_address(launcher)
    if head is not None:
        say(f"the cluster is up, head {head}")
    elif not confirmed("start this cluster?", options.yes):
        raise UserError("nothing was started")
    else:  # not part of the work: should it fail, there is no cluster to take down or to warn of
        ray_launcher.prepare_cloud(launcher)

    def work() -> Outcome:
        if head is None:
            say(f"starting the cluster, which takes minutes (log: {ray_launcher.log_file(launcher)})")
            ray_launcher.bring_up(launcher)
        with through_ssh(launcher) as jobs:
            outcome = _submitted(jobs, request, target, options, objects)
        if outcome.status == 0 and not outcome.detached:
            bring_home(launcher, request.command, request.run)
        return outcome

    return _and_afterwards(launcher, options.down, work).status


def attach(target: Target, job: str | None, down: bool, objects: TextIO | None) -> int:
    """Follow a job that was sent before; None is the newest. Returns its exit status."""
    if target.kind == "dashboard":
        with dashboard(target) as jobs:
            chosen = which(jobs, job)
            return follow(jobs, chosen, reattach(target, chosen), objects).status
    launcher = running_launcher(target)

    def work() -> Outcome:
        with through_ssh(launcher) as jobs:
            chosen = which(jobs, job)
            outcome = follow(jobs, chosen, reattach(target, chosen), objects)
            metadata = jobs.info(chosen).metadata or {} if outcome.status == 0 else {}
        if "run" in metadata:
            bring_home(launcher, str(metadata["command"]), str(metadata["run"]))
        return outcome

    return _and_afterwards(launcher, down, work).status


def reattach(target: Target, job: str) -> str:
    """The command that follows the job again."""
    return shlex.join(["ckd-ray", "attach", target.text, job])


def running_launcher(target: Target) -> LauncherFile:
    """The launcher's file, with its token in use.

    Raises:
        UserError: its cluster is not up.
    """
    launcher = read_launcher_file(target.text, strict=False)
    ray_launcher.use_launcher_s_token(launcher)
    if ray_launcher.head_address(launcher) is None:
        raise UserError(
            "this cluster is not up", where=target.text, fix=f"a job with --cluster {target.text} starts it"
        )
    return launcher


@contextmanager
def dashboard(target: Target) -> Iterator[Jobs]:
    """The jobs of the dashboard at an address.

    Raises:
        UserError: nobody answers there, or our token is refused.
    """
    use_token()
    if target.in_clear:
        say(f"{target.text}: without https the token and the data travel in clear; an SSH tunnel hides them")
    jobs = Jobs(Direct(target.text), target.text)
    try:
        jobs.client()
    except ConnectionError as error:
        raise UserError(
            "no dashboard answers here",
            where=target.text,
            expected="the dashboard of a running head (http://HOST:8265)",
            found=str(error),
        ) from error
    yield jobs


@contextmanager
def through_ssh(launcher: LauncherFile) -> Iterator[Jobs]:
    """The jobs of a launcher's cluster, through a tunnel; a head that has just started is given two minutes.

    Raises:
        JobError: it cannot be reached.
    """
    with Tunnel(ray_launcher.ssh_command(launcher)) as tunnel:
        jobs = Jobs(tunnel, launcher.path)
        deadline = time.monotonic() + _DASHBOARD_WITHIN_S
        while True:
            try:
                jobs.client()
                break
            except ConnectionError as error:
                if time.monotonic() > deadline:
                    raise JobError(
                        f"the head of {launcher.path} is there, but no dashboard answers ({error}); if Ray has died on"
                        f" it, `ckd-ray down {shlex.quote(launcher.path)}` and start again"
                    ) from error
                time.sleep(2)
        yield jobs


def _submitted(jobs: Jobs, request: JobRequest, target: Target, options: ClusterOptions, objects: TextIO) -> Outcome:
    """Send the job, and follow it unless it is to be left."""
    busy = running(jobs, request.run)
    if busy is not None:
        raise UserError(
            "a job of this run is running there already",
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


def _and_afterwards(launcher: LauncherFile, down: bool, work: Callable[[], Outcome]) -> Outcome:
    """Whatever happens to the work, the cluster is taken down, or it is said how."""
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
