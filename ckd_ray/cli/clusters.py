"""The commands about clusters and their jobs: attach, status, down."""

from __future__ import annotations

from typing import Annotated

import typer

from ckd_ray.cli.command import CLUSTERS, DownOption, YesOption, command, put
from ckd_ray.streams import objects

TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="A cluster launcher's YAML, or a dashboard (http://HOST:8265).")
]


@command(CLUSTERS)
def status(target: TargetArgument, json_: bool) -> None:
    """Show whether a cluster is up, its nodes and its jobs."""
    from ckd_ray.jobs.manage import show_status, status as look
    from ckd_ray.ray_util.target import parse_target
    from ckd_ray.ray_util.token import use_token

    use_token()
    parsed = parse_target(target, "TARGET")
    assert parsed is not None
    found = look(parsed)
    put(found) if json_ else show_status(found)


@command(CLUSTERS)
def attach(
    target: TargetArgument,
    json_: bool,
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="Default: the newest one.")] = None,
    down: DownOption = False,
) -> int:
    """Follow a job on a cluster, from its first line. Ctrl-C stops the job; a second Ctrl-C leaves it alone."""
    from ckd_ray.jobs.remote import ClusterOptions, attach as follow_again
    from ckd_ray.ray_util.target import parse_remote

    parsed = parse_remote(target)
    ClusterOptions(down=down).check(parsed)
    return follow_again(parsed, job, down, objects() if json_ else None)


@command(CLUSTERS)
def down(target: TargetArgument, json_: bool, yes: YesOption = False) -> None:
    """End a cluster that was started from a YAML, with all jobs on it."""
    from ckd_ray.jobs.manage import down as end
    from ckd_ray.ray_util.target import parse_remote

    end(parse_remote(target), yes)
    if json_:
        put({"target": target, "up": False})
