"""A whole run on `s3://`: its process and then the server are killed in the middle, and another machine ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ckd_ray.files import filesystem_of, join, local_copy, make_folder, read_json, write_json_atomic
from ckd_ray.model import ColBERT
from tests.fault.s3_server import Server
from tests.support import overrides

pytest.importorskip("moto.server")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path / "bucket")
    found.start()
    yield found
    found.kill()


def test_a_request_outlasts_a_server_that_is_killed_and_started_again(server: Server) -> None:
    """What was answered before is still there, and a request that meets nobody waits for the server to come back."""
    make_folder(server.uri)
    uri = join(server.uri, "a.json")
    write_json_atomic(uri, {"n": 1})
    server.kill()
    back = threading.Timer(4.0, server.start)
    back.start()
    try:
        assert read_json(uri) == {"n": 1}
    finally:
        back.join()
    write_json_atomic(uri, {"n": 2})
    assert read_json(uri) == {"n": 2}


class Machine:
    """A machine of its own as far as a run can tell: home, working directory and cache."""

    def __init__(self, folder: Path, values: list[str]) -> None:
        self.folder, self.values = folder, values
        self.processes: list[subprocess.Popen[str]] = []
        for name in ("home", "cwd"):
            (folder / name).mkdir(parents=True)

    def train(self, storage: str) -> subprocess.Popen[str]:
        values = [f"run.storage={storage}", *(v for v in self.values if not v.startswith("run.storage="))]
        sets = [part for value in values for part in ("--set", value)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_ADDRESS"))}
        process = subprocess.Popen(
            [sys.executable, "-m", "ckd_ray", "train", "--cluster", "local", "--json", *sets],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder / "cwd",
            env={
                **environment, "HOME": str(self.folder / "home"), "CKD_RAY_CACHE": str(self.folder / "cache"),
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        )  # fmt: skip
        self.processes.append(process)
        return process

    def off(self) -> None:
        for process in self.processes:
            process.kill()


@pytest.fixture
def machines(tmp_path: Path, tiny_backbone: str, tiny_collection: str) -> Iterator[tuple[Machine, Machine]]:
    changes = ("embed.passages_per_shard=4", "embed.actors=1", "evaluate.baselines=[encoder,bm25]")
    values = overrides("unused", tiny_backbone, tiny_collection, *changes)
    both = Machine(tmp_path / "first", values), Machine(tmp_path / "second", values)
    yield both
    for machine in both:
        machine.off()


def wait_for(process: subprocess.Popen[str], seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 900
    while not seen():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[1][-3000:])
        time.sleep(0.02)


def results(run: str) -> tuple[dict[str, torch.Tensor], dict[str, bytes]]:
    """The student's weights, and the rankings that all systems gave."""
    with local_copy(join(run, "student")) as folder:
        weights = {name: value.clone() for name, value in ColBERT.from_pretrained(folder).state_dict().items()}
    rankings = {}
    folders = dict.fromkeys(("teacher", "student"), "evaluation")
    folders |= {name: f"baselines/{name}" for name in ("encoder", "bm25")}
    for system, folder in folders.items():
        for split in ("dev", "test"):
            fs, path = filesystem_of(join(run, folder, f"{system}.{split}.run"))
            with fs.open_input_stream(path) as stream:
                rankings[f"{system} {split}"] = stream.read()
    return weights, rankings


@pytest.mark.soak
def test_a_run_survives_the_loss_of_its_process_and_of_the_server_and_goes_on_elsewhere(
    server: Server, machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    first, second = machines

    def shards() -> dict[str, float]:
        return {n: t for n, t in server.objects().items() if "/embeddings/passages/" in n and n.endswith(".arrow")}

    process = first.train(server.uri)
    wait_for(process, lambda: len(shards()) >= 3)
    process.kill()
    process.communicate()
    time.sleep(3)  # its actors are gone with it
    before = shards()
    assert 3 <= len(before) < 15, "the kill came too late to mean anything"

    process = second.train(server.uri)
    wait_for(process, lambda: "runs/tiny/rankings/_manifest.json" in server.objects())
    server.kill()
    time.sleep(5)
    assert process.poll() is None, "the outage was over before anybody noticed"
    server.start()
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err[-3000:]
    assert f"{len(before)} shards are there already" in err and "secret" not in out + err
    assert {name: shards()[name] for name in before} == before and len(shards()) == 15
    skipped = {stage["name"]: stage["skipped"] for stage in json.loads(out)["stages"]}
    assert skipped == {
        "collection": True, "teacher": True, "embed": False, "retrieve": False, "label": False, "distill": False,
        "evaluate": False,
    }  # fmt: skip

    near = tmp_path / "near"
    process = second.train(str(near))
    err = process.communicate(timeout=1200)[1]
    assert process.returncode == 0, err[-3000:]
    (far_weights, far_rankings), (near_weights, near_rankings) = (
        results(join(server.uri, "tiny")),
        results(str(near / "tiny")),
    )
    assert far_rankings == near_rankings
    assert all(torch.equal(far_weights[name], value) for name, value in near_weights.items())

    again = first.train(server.uri)
    out, err = again.communicate(timeout=1200)
    assert again.returncode == 0 and all(stage["skipped"] for stage in json.loads(out)["stages"]), err[-3000:]
