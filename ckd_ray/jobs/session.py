"""What stands around a command or a call that computes: its configuration, checked, and Ray."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ckd_ray.checks import check_inputs, load_config
from ckd_ray.config import Config
from ckd_ray.jobs.nodes import check_nodes_see
from ckd_ray.jobs.placeholders import check_config_filled_in
from ckd_ray.ray_util.machines import asked_resources, wait_for_nodes
from ckd_ray.ray_util.session import connected
from ckd_ray.ray_util.stuck import moving
from ckd_ray.ray_util.watch import terminate
from ckd_ray.tracking import forget_failures


@contextmanager
def session(config: str | None, overrides: Sequence[str], cluster: str | None) -> Iterator[Config]:
    """The configuration, checked before anything starts, and Ray around the block (see `connected`).

    Args:
        config, overrides: see `load_config`.
        cluster: see `connected`.
    """
    forget_failures()
    loaded = load_config(config, overrides)
    check_config_filled_in(loaded)
    check_inputs(loaded)
    with _terminable(), connected(cluster):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)  # Ray has put a handler in place that exits without a message
        wait_for_nodes()
        with asked_resources(), moving(60 * loaded.run.stuck_after_minutes):
            check_nodes_see(loaded)
            yield loaded


@contextmanager
def _terminable() -> Iterator[None]:
    """The handler of SIGTERM is the caller's again after the block; only the main thread may set one."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)
