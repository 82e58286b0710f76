"""A real autoscaler that begins without a worker, and starts those that its file declares."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray._private import services

from tests.ray_head import started_head

ASK = """
import json, os, ray
from ckd_ray.ray_util import machines

ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
found = {"declared": machines.declared_gpus(), "before": machines.wait_for_gpus(expected=False)}
with machines.asked_resources():
    found["after"] = machines.wait_for_gpus(expected=False)
    machines._wait_for({"GPU": 2})  # the others come as well
    found["gpus"] = ray.cluster_resources()["GPU"]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_gpus_that_are_declared_and_not_there_yet_come(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"{services.get_node_ip_address()}:{probe.getsockname()[1]}"
    worker = {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    declared: dict[str, Any] = {
        "cluster_name": "declared",
        "max_workers": 8,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
        # Its machines are nodes of Ray on this one.
        "provider": {"type": "fake_multinode", "gcs_address": address, "launch_multiple": True},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": worker,
        },
        "head_node_type": "ray.head.default",
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in ("cluster_synced_files", "initialization_commands", "rsync_exclude", "rsync_filter")},
        **{f"{name}setup_commands": [] for name in ("", "head_", "worker_")},
        **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
        "file_mounts_sync_continuously": False,
    }
    (tmp_path / "cluster.json").write_text(json.dumps(declared))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    options = ["--include-dashboard=false", f"--autoscaling-config={tmp_path / 'cluster.json'}"]
    with started_head(tmp_path, environment, f"--port={address.rpartition(':')[2]}", *options):
        environment["RAY_ADDRESS"] = address
        done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"declared": 2, "before": False, "after": True, "gpus": 2.0}
    assert "no GPU yet; its autoscaler is asked for the 2 that it may start" in done.stderr
    assert "waiting for machines: 0 of 1 GPU" in done.stderr
