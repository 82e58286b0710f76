"""`ckd-ray doctor`: what this machine and its cluster offer, what is missing, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ckd_ray.config import Config
from ckd_ray.doctor import access as access, machine as machine, ray_version as ray_checks, tls as tls
from ckd_ray.doctor.check import Check
from ckd_ray.doctor.target import cluster
from ckd_ray.progress import without_secrets
from ckd_ray.ray_util.target import Target


def examine(config: Config, target: Target | None = None) -> list[Check]:
    """Every check, in the order in which they are shown. Starts no Ray; joins one that runs, and leaves it again.

    Args:
        target: what `--cluster` names. Of machines that jobs are sent to, only the way there is looked at.
    """
    found: list[Check] = []
    for one in _all(config, target):
        found += [Check(c.name, c.state, without_secrets(c.found), c.fix) for c in one()]
    return found


def _all(config: Config, target: Target | None) -> Iterator[Callable[[], Iterator[Check]]]:
    storage = config.run.storage
    joined = ray_checks.running_ray(target)
    yield machine.versions
    yield lambda: machine.extras(config)
    yield machine.processor
    yield machine.memory
    yield machine.shared_memory
    yield machine.accelerators
    yield lambda: access.storage(storage)
    yield lambda: access.scratch(storage)
    yield lambda: access.clock(storage)
    yield access.token
    yield tls.transport_encryption
    yield lambda: ray_checks.ports(joined)
    yield lambda: iter([joined.check])
    if target is not None and target.remote:
        yield lambda: cluster(target)
    yield lambda: machine.hostname(several_machines=joined.nodes > 1)
