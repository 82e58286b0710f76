"""The command that looks at the machine: doctor."""

from __future__ import annotations

import typer

from ckd_ray.cli import ConfigOption, JsonOption, QuietOption, SetOption, app, guarded, put
from ckd_ray.cli.jobs import ClusterOption
from ckd_ray.errors import JobError


@app.command()
@guarded
def doctor(
    config: ConfigOption = None,
    set_: SetOption = None,
    cluster: ClusterOption = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """What this machine and its cluster offer, and what to do about what is missing. Exits with 1 if a check fails."""
    from ckd_ray.checks import load_config
    from ckd_ray.cli import _nothing_else_on_stdout
    from ckd_ray.doctor.check import as_json, render
    from ckd_ray.doctor.run import examine
    from ckd_ray.ray_util.target import parse_target

    target = parse_target(cluster)
    loaded = load_config(config, set_ or [])
    with _nothing_else_on_stdout():
        checks = examine(loaded, target)
        if json_:
            put(as_json(checks))
        elif not quiet:
            typer.echo(render(checks), err=True)
    failed = [check.name for check in checks if check.state == "fail"]
    if failed:
        raise JobError(f"doctor: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
