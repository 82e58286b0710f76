"""All checks of `ckd-ray doctor`, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ckd_ray.config import Config
from ckd_ray.doctor import access, machine, ray_version as ray_checks, tls
from ckd_ray.doctor.check import Check
from ckd_ray.doctor.target import cluster
from ckd_ray.progress import without_secrets
from ckd_ray.ray_util.target import Target


def examine(config: Config, target: Target | None = None) -> list[Check]:
    """Every check. No Ray is started; one that runs is joined, and left again.

    Args:
        target: what `--cluster` names. Of a cluster for jobs, only the connection is checked.
    """
    return [replace(check, found=without_secrets(check.found)) for check in _all(config, target)]


def _all(config: Config, target: Target | None) -> Iterator[Check]:
    storage = config.run.storage
    joined = ray_checks.running_ray(target)
    yield from machine.versions()
    yield from machine.extras(config)
    yield from machine.processor()
    yield from machine.memory()
    yield from machine.shared_memory()
    yield from machine.accelerators()
    yield from access.storage(storage)
    yield from access.scratch(storage)
    yield from access.clock(storage)
    yield from access.token()
    yield from tls.transport_encryption()
    yield from ray_checks.ports(joined)
    yield joined.check
    if target is not None and target.remote:
        yield from cluster(target)
    yield from machine.hostname(several_machines=joined.nodes > 1)
