"""`ckd-ray train --cluster cluster/local.yaml` on hosts of their own, through the real launcher; two lose their power.

    pytest -m soak tests/fault/test_two_hosts.py -s

One host goes in the middle of embedding, one in the middle of training, which was running on both that were left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ckd_ray.evaluate.runs import read_trec_run
from ckd_ray.files import sha256_of
from ckd_ray.model import ColBERT
from tests.fault.netns_hosts import Hosts, missing
from tests.support import overrides, write_collection

pytestmark = pytest.mark.soak
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "ckd_ray"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Hosts(3, tmp_path_factory.mktemp("hosts"), str(Path(sys.executable).parent)) as made:
        yield made


def clean_environment() -> dict[str, str]:
    """Nothing of another cluster's; and patience, on a busy machine."""
    others = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    return {k: v for k, v in os.environ.items() if k not in others} | {"RAY_raylet_start_wait_time_s": "300"}


def launcher_file(folder: Path, hosts: Hosts) -> Path:
    """cluster/local.yaml with what its comments say to change: addresses, user, key; nothing is installed."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    head, *workers = hosts.addresses.values()
    values["cluster_name"] = "ckd-netns"
    values["provider"] |= {"head_ip": head, "worker_ips": workers}
    values["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.key)}
    values["file_mounts"] = {"~/.ray/auth_token": str(folder / "auth_token")}
    values["setup_commands"] = values["setup_commands"][:1]
    assert "chmod 600" in values["setup_commands"][0]
    size = "ray start --num-cpus=1 --object-store-memory=157286400"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        values[key] = [command.replace("ray start", size) for command in values[key]]
    path = folder / "cluster-local.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def settings(storage: Path | str, backbone: str, collection: str, *more: str) -> list[str]:
    values = overrides(
        storage, backbone, collection, "embed.passages_per_shard=2", "distill.batch_size=12", "distill.steps=240",
        "distill.checkpoint_every=10", "distill.learning_rate=0.0003", *more,
    )  # fmt: skip
    return [part for value in values for part in ("--set", value)]


def wait_for(found: Callable[[], object], process: subprocess.Popen[str], said: list[str]) -> None:
    deadline = time.monotonic() + 2400
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, "".join(said[-60:])
        time.sleep(0.02)


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(str(path)) for path in folder.glob("*.arrow")}


def latest_step(run: Path) -> int:
    """The step of the student's last checkpoint."""
    return max((int(p.name.rpartition("-")[2]) for p in run.glob("checkpoints/distill-*/step-*")), default=0)


def places(hosts: Hosts, name: str) -> int:
    """Training workers that run on the host."""
    listed = subprocess.run(hosts.ssh(name, "ps ax -o args"), capture_output=True, text=True).stdout
    return listed.count("RayTrainWorker")


def test_what_only_the_head_sees_is_refused_before_the_first_stage(
    hosts: Hosts, tmp_path: Path, tiny_backbone: str, tiny_collection: str
) -> None:
    """`/root` is each host's own. The cluster stays up between commands, is looked at, and taken down."""
    cluster = str(launcher_file(tmp_path, hosts))
    head, *workers = hosts.names
    (tmp_path / "launcher").mkdir()
    environment = {**clean_environment(), "RAY_TMPDIR": str(tmp_path / "launcher")}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=900)
        print(f"{time.strftime('%H:%M:%S')} {arguments[0]} -> {done.returncode}\n{done.stderr}", flush=True)
        return done

    for path in (tiny_collection, tmp_path / "shared"):
        assert not str(path).startswith("/root")
    done = call("embed", *settings("runs", tiny_backbone, tiny_collection), "--cluster", cluster, "-y")
    assert done.returncode == 2 and "run.storage: not every node sees this folder" in done.stderr
    assert all(f"{name} ({hosts.addresses[name]})" in done.stderr for name in workers)
    assert "THE CLUSTER IS STILL UP" in done.stderr and "collection: starting" not in done.stderr
    copy = f"mkdir -p /root/data && cp {tiny_collection}/* /root/data/"
    subprocess.run(hosts.ssh(head, copy), check=True, capture_output=True)
    arguments = settings(tmp_path / "shared", tiny_backbone, "/root/data")
    done = call("embed", *arguments, "--cluster", cluster)
    assert done.returncode == 2 and "collection.path /root/data: not every node sees this path" in done.stderr
    assert all(name in done.stderr for name in workers) and head not in done.stderr.rpartition("found:")[2]
    for name in workers:
        subprocess.run(hosts.ssh(name, f"{copy}; echo >> /root/data/queries.dev.tsv"), check=True, capture_output=True)
    done = call("embed", *arguments, "--cluster", cluster)
    assert done.returncode == 2 and "it has other contents on" in done.stderr
    for name in workers:
        subprocess.run(hosts.ssh(name, copy), check=True, capture_output=True)
    done = call("embed", *arguments, "--cluster", cluster, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["stages"][-1]["name"] == "embed"
    found = json.loads(call("status", cluster, "--json").stdout)
    assert [n["state"] for n in found["nodes"]] == ["ALIVE"] * 3 and found["nodes"][0]["head"]
    assert [j["exit_status"] for j in found["jobs"]] == [2, 2, 2, 0]
    again = call("attach", cluster, found["jobs"][-1]["job"])
    assert again.returncode == 0 and "embed: 60 passages" in again.stderr
    assert call("down", cluster, "-y").returncode == 0
    assert json.loads(call("status", cluster, "--json").stdout)["up"] is False
    assert call("attach", cluster).returncode == 2


def test_two_of_three_hosts_lose_their_power(
    hosts: Hosts, tmp_path: Path, tiny_backbone: str, request: pytest.FixtureRequest
) -> None:
    collection = str(write_collection(tmp_path / "collection", passages=160))
    environment = clean_environment()
    first, second = hosts.names[1:]
    there = environment | {"RAY_TMPDIR": str(tmp_path / "launcher")}
    (tmp_path / "launcher").mkdir()
    arguments = settings(tmp_path / "shared", tiny_backbone, collection, "distill.workers=1-2")
    cluster = launcher_file(tmp_path, hosts)
    command = [*COMMAND, "train", *arguments, "--cluster", str(cluster), "-y", "--down", "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=there, cwd=tmp_path
    )
    said: list[str] = []

    def listen() -> None:
        for line in process.stderr:  # type: ignore[union-attr]
            said.append(line)
            print(f"{time.strftime('%H:%M:%S')} {line}", end="", flush=True)

    threading.Thread(target=listen, daemon=True).start()
    request.addfinalizer(process.kill)  # nothing is left where an assertion fails
    run = tmp_path / "shared" / "tiny"
    wait_for(lambda: len(files_of_names(run / "embeddings" / "passages")) >= 15, process, said)
    hosts.switch_off(first)
    before = files_of_names(run / "embeddings" / "passages")
    print(f"{time.strftime('%H:%M:%S')} {first} has lost its power with {len(before)} shards", flush=True)
    assert 15 <= len(before) < 75
    wait_for(lambda: latest_step(run) >= 50, process, said)
    workers = {name: places(hosts, name) for name in (hosts.names[0], second)}
    hosts.switch_off(second)
    cut_at = latest_step(run)
    print(f"{time.strftime('%H:%M:%S')} {second} has lost its power at step {cut_at}; workers: {workers}", flush=True)
    assert cut_at < 220
    out, _ = process.communicate(timeout=2400)
    assert process.returncode == 0, "".join(said[-60:])
    told = json.loads(out)
    assert set(workers.values()) == {1}, workers
    assert told["run"] == str(run) and told["comparison"]
    assert "the cluster is down" in "".join(said)
    assert (tmp_path / "auth_token").stat().st_mode & 0o077 == 0

    plain = [*COMMAND, "train", *settings(tmp_path / "plain", tiny_backbone, collection, "distill.workers=1")]
    done = subprocess.run([*plain, "--cluster", "local"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    plain_run = tmp_path / "plain" / "tiny"
    assert files_of(run / "embeddings/passages") == files_of(plain_run / "embeddings/passages")
    mine, theirs = (ColBERT.from_pretrained(folder / "student") for folder in (run, plain_run))
    teacher = ColBERT.from_pretrained(run / "teacher")
    a, b, c = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (mine, theirs, teacher))
    moved, apart = float((a - c).norm()), float((a - b).norm())
    losses = [read_metrics(folder / "student") for folder in (run, plain_run)]
    most = max(abs(x - y) for x, y in zip(*losses, strict=True))
    print(f"the student moved by {moved:.3g}, is {apart:.3g} from the undisturbed one; losses differ by {most:.2g}")
    # Two workers add in another order, and Adam makes whole steps of the rounding where a gradient is next to nothing.
    assert len(losses[0]) == 240 and most < 1e-5
    assert moved > 0.1 and apart < moved / 50
    runs = [read_trec_run(str(folder / "evaluation/student.dev.run")) for folder in (run, plain_run)]
    tops = [r.sort_values(["query_id", "rank"]).groupby("query_id").head(5)["doc_id"].tolist() for r in runs]
    assert tops[0] == tops[1]
    home = tmp_path / "runs" / "tiny"
    assert (home / "run.json").exists() and (home / "student" / "model.safetensors").exists()
    assert torch.allclose(next(ColBERT.from_pretrained(home / "student").parameters()), next(mine.parameters()))


def read_metrics(folder: Path) -> list[float]:
    """The loss of every step."""
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files_of_names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.arrow")}
