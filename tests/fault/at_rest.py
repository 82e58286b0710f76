"""Run by a test: when Ray is at rest, of a cluster that has lost a node."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from tests.ray_head import small_ray


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.placement_group import placement_group, remove_placement_group

    from ckd_ray.ray_util.stuck import _ray_is_at_rest

    quiet = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **quiet})
    lost = cluster.add_node(num_cpus=1, **quiet)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    def becomes(expected: bool) -> bool:
        deadline = time.monotonic() + 30
        while _ray_is_at_rest() != expected and time.monotonic() < deadline:
            time.sleep(0.2)
        return _ray_is_at_rest() == expected

    found: dict[str, Any] = {"before a node has left": _ray_is_at_rest()}
    cluster.remove_node(lost, allow_graceful=False)
    found["after that"] = becomes(True)

    @ray.remote(num_cpus=0.001)
    def sleeps() -> None:
        time.sleep(600)

    @ray.remote(num_gpus=1, max_restarts=-1)
    class Waits:
        pass

    task = sleeps.remote()
    found["a task works"] = becomes(False)
    ray.cancel(task, force=True)
    found["it has ended"] = becomes(True)
    task = sleeps.options(num_cpus=4).remote()
    found["a task waits for a machine"] = becomes(False)
    ray.cancel(task, force=True)
    found["it waits no more"] = becomes(True)
    actor = Waits.remote()
    found["an actor waits for a machine"] = becomes(False)
    ray.kill(actor)
    found["it is gone"] = becomes(True)
    group = placement_group([{"CPU": 1}] * 3)
    found["a training waits for machines"] = becomes(False)
    remove_placement_group(group)
    found["it is given up"] = becomes(True)
    print(json.dumps(found), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)
    with small_ray():
        main()
