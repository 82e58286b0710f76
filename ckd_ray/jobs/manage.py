"""`ckd-ray status` and `ckd-ray down`."""

from __future__ import annotations

from typing import Any

from ckd_ray.errors import UserError
from ckd_ray.jobs import launcher as ray_launcher
from ckd_ray.jobs.confirm import confirmed
from ckd_ray.jobs.launcher_file import describe, read_launcher_file
from ckd_ray.jobs.remote import dashboard, through_ssh
from ckd_ray.jobs.submit import Jobs
from ckd_ray.progress import duration, say
from ckd_ray.ray_util.session import connected
from ckd_ray.ray_util.target import Target


def status(target: Target) -> dict[str, Any]:
    """The object of `--json`: whether the cluster is up, its nodes and its jobs."""
    if target.kind == "dashboard":
        with dashboard(target) as jobs:
            return {"target": target.text, "up": True, **_seen(jobs)}
    if target.kind != "launcher":
        with connected(target.text):
            return {"target": target.text, "up": True, "nodes": _joined(), "jobs": None}
    launcher = read_launcher_file(target.text, strict=False)
    for line in describe(launcher):
        say(line)
    ray_launcher.use_launcher_s_token(launcher)
    head = ray_launcher.head_address(launcher)
    if head is None:
        return {"target": target.text, "up": False, "nodes": [], "jobs": []}
    with through_ssh(launcher) as jobs:
        return {"target": target.text, "up": True, "head": head, **_seen(jobs)}


def show_status(found: dict[str, Any]) -> None:
    """Print what `status` returned, for people."""
    if not found["up"]:
        say("not up")
        return
    for node in found["nodes"]:
        have = ", ".join(f"{amount:g} {name}" for name, amount in node["resources"].items())
        say(f"  {node['address']:<16} {node['state'].lower():<6} {'head  ' if node['head'] else 'worker'} {have}")
    for job in found["jobs"] or []:
        took = f", {duration(job['seconds'])}" if job["seconds"] is not None else ""
        say(f"  job {job['job']}: {job['status'].lower()}{took}  {job['run'] or ''}")
    if found["jobs"] == []:
        say("  no jobs")


def down(target: Target, yes: bool) -> None:
    """End the cluster of a launcher's file, after a question."""
    if target.kind != "launcher":
        raise UserError(
            "only a cluster that was started from a YAML can be taken down",
            where=target.text,
            fix="name the YAML; `ray stop` on its machine ends a head that was started by hand",
        )
    launcher = read_launcher_file(target.text, strict=False)
    for line in describe(launcher):
        say(line)
    if not confirmed("end this cluster and all jobs on it?", yes):
        raise UserError("nothing was ended")
    ray_launcher.use_launcher_s_token(launcher)
    ray_launcher.take_down(launcher)
    say("the cluster is down")


def _seen(jobs: Jobs) -> dict[str, Any]:
    return {"nodes": jobs.nodes(), "jobs": [_job(details) for details in jobs.all()]}


def _job(details: Any) -> dict[str, Any]:
    metadata = details.metadata or {}
    ended = details.end_time and details.start_time  # in milliseconds
    return {
        "job": details.submission_id,
        "status": details.status.value,
        "command": metadata.get("command"),
        "run": metadata.get("run"),
        "seconds": (details.end_time - details.start_time) / 1000 if ended else None,
        "exit_status": details.driver_exit_code,
    }


def _joined() -> list[dict[str, Any]]:
    import ray

    return [
        {
            "address": node["NodeManagerAddress"],
            "state": "ALIVE" if node["Alive"] else "DEAD",
            "head": "node:__internal_head__" in node["Resources"],
            "resources": {k: float(v) for k, v in node["Resources"].items() if k in ("CPU", "GPU")},
        }
        for node in ray.nodes()
    ]
