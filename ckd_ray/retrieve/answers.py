"""Answers of a store's servers, as they arrive, with a limit on the time that a lost server has to find a machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from ckd_ray.errors import JobError
from ckd_ray.ray_util.waiting import INDEX_S, no_answer

# A server whose machine or GPU is lost is started on another one. An autoscaler starts a machine within this time.
_PLACE_S = 900.0
_LOOK_EVERY_S = 20.0
_WITHOUT_A_PLACE = ("PENDING_CREATION", "RESTARTING", "DEPENDENCIES_UNREADY")


def arrived(calls: Mapping[Any, Any], needs: str) -> Iterator[Any]:
    """The answers to `calls`, the first one first.

    Args:
        calls: the server of each call.
        needs: what a server reserves, for the message.

    Raises:
        JobError: for a quarter of an hour a server has found no machine, after its own was lost; or no server has
            answered for a day.
    """
    waiting, since, last = dict(calls), dict[str, float](), time.monotonic()
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=_LOOK_EVERY_S)
        if done:
            del waiting[done[0]]
            last = time.monotonic()
            yield ray.get(done[0], timeout=_LOOK_EVERY_S)
        elif time.monotonic() - last > INDEX_S:
            raise no_answer("the servers of the store", INDEX_S)
        else:
            _check_places([actor._actor_id.hex() for actor in waiting.values()], since, needs)


def _check_places(actors: list[str], since: dict[str, float], needs: str) -> None:
    """Note in `since` which actors have no process; JobError for one that has had none for too long."""
    from ray._private import state

    now = time.monotonic()
    for actor in actors:
        if state.actors(actor).get("State") not in _WITHOUT_A_PLACE:
            since.pop(actor, None)
        elif now - since.setdefault(actor, now) >= _PLACE_S:
            have, free = (
                f"{found.get('CPU', 0):g} CPU and {found.get('GPU', 0):g} GPU"
                for found in (ray.cluster_resources(), ray.available_resources())
            )
            raise JobError(
                f"{len(since)} of the servers of the store have had no machine for {_PLACE_S:.0f} s: each needs"
                f" {needs}; the cluster has {have}, and {free} are free. Give the same command again, which takes what"
                " there is then: finished parts are kept"
            )
