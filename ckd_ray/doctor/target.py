"""Checks of a cluster for jobs: its file, or its dashboard."""

from __future__ import annotations

from collections.abc import Iterator

from ckd_ray.doctor.check import Check
from ckd_ray.errors import JobError, UserError, first_line
from ckd_ray.jobs import launcher as ray_launcher
from ckd_ray.jobs.launcher_file import read_launcher_file, warnings
from ckd_ray.jobs.remote import dashboard
from ckd_ray.ray_util.target import Target

_NAME = "cluster"


def cluster(target: Target) -> Iterator[Check]:
    """Starts nothing and asks no cloud; `ckd-ray status` shows whether the cluster of a file is up."""
    try:
        yield from _launcher(target) if target.kind == "launcher" else _dashboard(target)
    except UserError as error:
        found = ": ".join(part for part in (error.where, error.problem, error.found) if part)
        yield Check(_NAME, "fail", found, error.fix or error.expected or f"correct {target.text}")
    except (JobError, ConnectionError) as error:  # another program answers there
        yield Check(_NAME, "fail", first_line(error), f"check what runs at {target.text}")


def _launcher(target: Target) -> Iterator[Check]:
    launcher = read_launcher_file(target.text)
    ray_launcher.check_can_launch(launcher)
    yield Check(
        _NAME, "ok", f"{target.text} can be used ({launcher.provider}); `ckd-ray status` shows whether it is up"
    )
    for text in warnings(launcher):
        yield Check(_NAME, "warn", text, f"correct {target.text}")


def _dashboard(target: Target) -> Iterator[Check]:
    with dashboard(target) as jobs:
        nodes = jobs.nodes()
    yield Check(_NAME, "ok", f"{target.text} answers; machines: {len(nodes)}")
