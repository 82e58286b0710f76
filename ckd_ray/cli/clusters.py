"""The commands about clusters and their jobs: attach, status, down."""

from __future__ import annotations

from typing import Annotated

import typer

from ckd_ray.cli import JsonOption, QuietOption, app, guarded, put
from ckd_ray.cli.jobs import DownOption, YesOption

TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="A cluster launcher's YAML, or a dashboard (http://HOST:8265).")
]


@app.command()
@guarded
def attach(
    target: TargetArgument,
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="The newest one when left out.")] = None,
    down: DownOption = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Follow a job that runs on a cluster, from its beginning. Ctrl-C stops the job, twice leaves it alone."""
    from ckd_ray.jobs.launcher import object_stream
    from ckd_ray.jobs.remote import ClusterOptions, attach as follow_again
    from ckd_ray.progress import set_quiet
    from ckd_ray.ray_util.target import parse_remote

    set_quiet(quiet)
    parsed = parse_remote(target)
    ClusterOptions(down=down).check(parsed)
    with object_stream(quiet) as objects:
        status = follow_again(parsed, job, down, objects if json_ else None)
    if status:
        raise typer.Exit(status)


@app.command()
@guarded
def status(target: TargetArgument, json_: JsonOption = False, quiet: QuietOption = False) -> None:
    """Show whether a cluster is up, its nodes and its jobs."""
    from ckd_ray.jobs.launcher import object_stream
    from ckd_ray.jobs.manage import show_status, status as look
    from ckd_ray.progress import set_quiet
    from ckd_ray.ray_util.target import parse_target
    from ckd_ray.ray_util.token import use_token

    set_quiet(quiet)
    use_token()
    parsed = parse_target(target, "TARGET")
    assert parsed is not None
    with object_stream(quiet):
        found = look(parsed)
    put(found) if json_ else show_status(found)


@app.command()
@guarded
def down(target: TargetArgument, yes: YesOption = False, json_: JsonOption = False, quiet: QuietOption = False) -> None:
    """End a cluster that was started from a YAML, with all jobs on it."""
    from ckd_ray.jobs.launcher import object_stream
    from ckd_ray.jobs.manage import down as end
    from ckd_ray.progress import set_quiet
    from ckd_ray.ray_util.target import parse_remote

    set_quiet(quiet)
    parsed = parse_remote(target)
    with object_stream(quiet):
        end(parsed, yes)
    if json_:
        put({"target": target, "up": False})
