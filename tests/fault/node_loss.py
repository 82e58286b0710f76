"""Run by a test: a cluster of two nodes embeds, and the node that encodes is cut off in the middle of a shard."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path


def main(run: str, out: str, calls_path: str) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from ckd_ray.cluster.connect import _quiet_data
    from ckd_ray.config import EmbedConfig
    from ckd_ray.embed.stream import embed_texts, plan_shards
    from tests.fault.stand_in import Calls, identity, job_of, make_encoder

    quiet = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **quiet})
    lost = cluster.add_node(num_cpus=1, **quiet)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    _quiet_data()
    job, calls = job_of(run, out), Calls(Path(calls_path))
    seen: dict[str, object] = {}

    def embed() -> None:
        embed_texts([(job, plan_shards(60, 5))], EmbedConfig(), make_encoder=make_encoder(calls.path, 0.5))
        seen["done"] = True

    thread = threading.Thread(target=embed, daemon=True)
    thread.start()
    deadline = time.monotonic() + 150
    its_workers: list[int] = []
    while not (its_workers and len(calls.ended()) >= 2):
        assert time.monotonic() < deadline and thread.is_alive(), "nothing was encoded on the node that is to go"
        time.sleep(0.02)
        busy = calls.in_the_middle()
        its_workers = [pid for pid in busy if _descends(pid, _raylet(lost))]
    before = identity(Path(out))
    cluster.remove_node(lost, allow_graceful=False)
    thread.join(150)
    print(json.dumps({"before": before, "done": seen.get("done", False), "cut_off": len(its_workers)}), flush=True)
    ray.shutdown()
    cluster.shutdown()


def _raylet(node: object) -> int:
    processes = node.all_processes["raylet"]  # type: ignore[attr-defined]
    return int(processes[0].process.pid)


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            return False
    return False


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)
    main(*sys.argv[1:])
