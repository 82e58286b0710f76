"""The command that checks this machine and its cluster: doctor."""

from __future__ import annotations

from ckd_ray.cli.command import CLUSTERS, ClusterOption, ConfigOption, SetOption, command, put
from ckd_ray.errors import JobError
from ckd_ray.progress import say


@command(CLUSTERS)
def doctor(json_: bool, config: ConfigOption = None, set_: SetOption = None, cluster: ClusterOption = None) -> None:
    """Check what this machine and its cluster offer, and say how to get what is missing. A failed check: status 1."""
    from ckd_ray.checks import load_config
    from ckd_ray.doctor.check import as_json, render
    from ckd_ray.doctor.run import examine
    from ckd_ray.ray_util.target import parse_target

    target = parse_target(cluster)
    checks = examine(load_config(config, set_ or []), target)
    put(as_json(checks)) if json_ else say(render(checks))
    failed = [check.name for check in checks if check.state == "fail"]
    if failed:
        raise JobError(f"doctor: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
