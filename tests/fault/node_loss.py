"""Run by a test: the only node that encodes is cut off in the middle of a shard, and another takes its place."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.ray_head import small_ray


def main(run: str, out: str, calls_path: str) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from ckd_ray.config import EmbedConfig
    from ckd_ray.embed.stream import embed_texts, plan_shards
    from ckd_ray.ray_util.session import _quiet_data
    from tests.fault.stand_in import Calls, identity, job_of, make_encoder

    quiet = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **quiet})
    lost = cluster.add_node(num_cpus=1, **quiet)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    _quiet_data()
    job, calls = job_of(run, out), Calls(Path(calls_path))
    seen: dict[str, object] = {}

    def embed() -> None:
        embed_texts([(job, plan_shards(60, 5))], EmbedConfig(), make_encoder=make_encoder(calls.path, 0.2))
        seen["done"] = True

    thread = threading.Thread(target=embed, daemon=True)
    thread.start()
    hold = Path(f"{calls.path}.hold")
    wait_for(lambda: len(calls.ended()) >= 2, thread)
    hold.touch()
    wait_for(lambda: len(calls.in_the_middle()) == 1, thread)
    time.sleep(0.5)  # a call that was about to end when the file came has ended; now one is held for sure
    wait_for(lambda: len(calls.in_the_middle()) == 1, thread)
    cut_off = calls.in_the_middle()
    cluster.add_node(num_cpus=1, **quiet)
    before = identity(Path(out))
    cluster.remove_node(lost, allow_graceful=False)
    for pid in cut_off:  # a machine takes its workers with it; here they would live on until they miss their raylet
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    hold.unlink()
    thread.join(150)
    print(json.dumps({"before": before, "done": seen.get("done", False), "cut_off": len(cut_off)}), flush=True)
    ray.shutdown()
    cluster.shutdown()


def wait_for(condition: Callable[[], bool], thread: threading.Thread) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)
    with small_ray():
        main(*sys.argv[1:])
