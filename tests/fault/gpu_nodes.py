"""Run by a test: a node with a GPU comes while another encodes, and then that one is lost. The GPUs are Ray's alone."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from tests.fault.node_loss import wait_for
from tests.ray_head import small_ray


def main(run: str, out: str, calls_path: str) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from ckd_ray.config import EmbedConfig
    from ckd_ray.embed.stream import EmbedJob, embed_texts, plan_shards
    from ckd_ray.ray_util.session import _quiet_data
    from tests.fault.stand_in import Calls, StandIn, job_of

    quiet = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **quiet})
    first = cluster.add_node(num_cpus=1, num_gpus=1, **quiet)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    _quiet_data()
    job, calls = job_of(run, out), Calls(Path(calls_path))
    seen: dict[str, Any] = {"done": False}
    nodes = Path(f"{calls_path}.nodes")
    nodes.mkdir()

    def make(job: EmbedJob, threads: int) -> StandIn:
        import ckd_ray.embed.stream as stream

        stream.actor_device = lambda: "cpu"  # PyTorch has no GPU here
        (nodes / ray.get_runtime_context().get_node_id()).touch()
        return StandIn(calls_path, 1.0)

    def embed() -> None:
        embed_texts([(job, plan_shards(60, 2))], EmbedConfig(), make_encoder=make)
        seen["done"] = True

    thread = threading.Thread(target=embed, daemon=True)
    thread.start()
    wait_for(lambda: len(calls.ended()) >= 1, thread)
    seen["alone"] = len(list(nodes.iterdir()))
    second = cluster.add_node(num_cpus=1, num_gpus=1, **quiet)
    wait_for(lambda: len(calls.in_the_middle()) == 2, thread)  # both at work
    seen["nodes"] = sorted(path.name for path in nodes.iterdir()) == sorted([first.node_id, second.node_id])
    cluster.remove_node(first, allow_graceful=False)
    seen["left"] = len(plan_shards(60, 2)) - len(calls.ended())
    thread.join(150)
    print(json.dumps(seen), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)
    with small_ray():
        main(*sys.argv[1:])
