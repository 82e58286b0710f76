"""`ckd-ray doctor`: what this machine and its cluster offer, what is missing, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ckd_ray.cluster import check_access as access, check_machine as machine, check_ray as ray_checks, check_tls as tls
from ckd_ray.cluster.check import Check
from ckd_ray.config import Config
from ckd_ray.progress import without_secrets


def examine(config: Config) -> list[Check]:
    """Every check, in the order in which they are shown. Starts no Ray; joins one that runs, and leaves it again."""
    found: list[Check] = []
    for one in _all(config):
        found += [Check(c.name, c.state, without_secrets(c.found), c.fix) for c in one()]
    return found


def _all(config: Config) -> Iterator[Callable[[], Iterator[Check]]]:
    storage = config.run.storage
    joined = ray_checks.running_ray()
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
    yield lambda: machine.hostname(several_machines=joined.nodes > 1)
