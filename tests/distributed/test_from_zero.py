"""A command on a cluster that begins without a worker: it asks for machines, waits for them, and gives them back."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.ray_head import started_head
from tests.support import overrides

pytestmark = pytest.mark.slow
HEAD_ID = "f" * 51 + "00000"  # that Ray's provider gives its head
NODES = "import ray; ray.init(address='auto', logging_level=40); print(sum(n['Alive'] for n in ray.nodes()))"


def launcher(address: str) -> dict[str, object]:
    """Ray's own provider of nodes that are processes of this machine: up to two of one CPU each, none at first."""
    empty: dict[str, object] = {
        key: []
        for key in (
            "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
            "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter",
            "cluster_synced_files",
        )
    }  # fmt: skip
    small = {"CPU": 1, "object_store_memory": 80 * 2**20}
    return empty | {
        "cluster_name": "from-zero",
        "max_workers": 2,
        "idle_timeout_minutes": 0.2,
        "upscaling_speed": 20,
        "provider": {
            "type": "fake_multinode", "gcs_address": address, "launch_multiple": True, "head_node_id": HEAD_ID,
        },
        "auth": {"ssh_user": "nobody"},
        "file_mounts": {},
        "docker": {},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": small, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
    }  # fmt: skip


def test_workers_come_for_a_command_and_go_after_it(tmp_path: Path, tiny_backbone: str, tiny_collection: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    config = tmp_path / "launcher.yaml"
    config.write_text(yaml.safe_dump(launcher(address)))
    home = tmp_path / "home"
    home.mkdir()
    own = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH")}
    own |= {"HOME": str(home), "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_AUTH_MODE": "token"}
    environment = {**own, "RAY_ADDRESS": address, "CKD_RAY_WAIT_FOR": "CPU=2"}
    of_head = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "0",  # the second one's provider of this kind is not in Ray's wheel
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_raylet_start_wait_time_s": "300",  # on a busy machine
    }
    options = [f"--autoscaling-config={config}", f"--port={port}", "--node-ip-address=127.0.0.1"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=900, check=False
        )

    with started_head(tmp_path, own | of_head, *options, "--num-cpus=0", "--include-dashboard=false"):
        sets = [f"--set={value}" for value in overrides(tmp_path / "runs", tiny_backbone, tiny_collection)]
        done = run("-m", "ckd_ray", "train", "--until", "embed", *sets)
        assert done.returncode == 0, done.stderr
        assert "waiting for machines: 0 of 2 CPU" in done.stderr
        assert (tmp_path / "runs/tiny/passages").is_dir()
        deadline = time.monotonic() + 180
        while (left := run("-c", NODES).stdout.strip()) != "1":
            assert time.monotonic() < deadline, f"{left} nodes are still there"
            time.sleep(3)
