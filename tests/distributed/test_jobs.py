"""Jobs on a real head with a dashboard and a token, run as a user runs them: followed, broken off, left, stopped."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ray_head import started_head
from tests.support import overrides

COMMAND = [sys.executable, "-m", "ckd_ray"]


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@dataclass(frozen=True)
class Head:
    """A `ray start --head` of our own: its dashboard's port, its address, and the environment that may talk to it."""

    dashboard: int
    address: str
    environment: dict[str, str]
    home: Path

    def call(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **more}
        return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300, env=environment)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*COMMAND, *arguments], env=self.environment, start_new_session=True, **pipes)  # type: ignore[call-overload]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Token from the environment, a home of its own. Killed by its process group, never by `ray stop`."""
    folder = tmp_path_factory.mktemp("head")
    home = folder / "home"
    home.mkdir()
    port, dashboard, agent = free_ports(3)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH")}
    environment |= {
        "HOME": str(home),
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_AUTH_MODE": "token",
        "RAY_raylet_start_wait_time_s": "300",  # on a busy machine
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    # The package is not on the head: it comes with the jobs. (An editable install elsewhere is behind it.)
    own = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    with started_head(folder, own, *ports, "--dashboard-host=127.0.0.1"):
        yield Head(dashboard, f"127.0.0.1:{port}", environment, home)


class Forwarder:
    """A TCP forwarder that can be cut: a tunnel to break."""

    def __init__(self, port: int, target: int) -> None:
        self.port, self.target = port, target
        self._sockets: list[socket.socket] = []
        self._server: socket.socket | None = None

    def open(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def cut(self) -> None:
        assert self._server is not None
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._sockets = []

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self._sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    @staticmethod
    def _pump(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        with suppress(OSError):
            other.shutdown(socket.SHUT_WR)


def sets(values: list[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def wait_for(found: object, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not found():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.soak
def test_a_job_is_followed_through_a_broken_connection(
    head: Head, tmp_path: Path, tiny_backbone: str, tiny_collection: str
) -> None:
    """Every line comes once, the object alone on standard output, though the connection is cut in the middle."""
    values = overrides(tmp_path, tiny_backbone, tiny_collection, "embed.passages_per_shard=2", "embed.actors=1")
    [port] = free_ports(1)
    forwarder = Forwarder(port, head.dashboard)
    forwarder.open()
    target = f"http://127.0.0.1:{port}"
    process = head.start("embed", *sets(values), "--cluster", target, "--json")
    said: list[str] = []
    threading.Thread(target=lambda: said.extend(process.stderr), daemon=True).start()  # type: ignore[arg-type]
    wait_for(lambda: any("teacher: starting" in line for line in said))
    forwarder.cut()
    wait_for(lambda: any("is lost" in line for line in said))
    forwarder.open()
    assert process.wait(200) == 0, said
    assert process.stdout is not None
    [line] = process.stdout.read().splitlines()
    stages = json.loads(line)["stages"]
    assert [s["name"] for s in stages] == ["collection", "teacher", "embed"] and stages[2]["figures"]["count"] == 60
    text = "".join(said)
    assert "connected again" in text and "joined Ray at" in text
    for once in ("collection: starting", "teacher: starting", "embed: starting", "embed: 60 passages"):
        assert text.count(once) == 1, text
    assert "ckd-ray-" not in text.replace("ckd-ray-0", "") or "ckd-ray-job-begins" not in text
    assert (tmp_path / "tiny" / "embeddings" / "passages" / "manifest.json").exists()


@pytest.mark.soak
def test_a_job_s_own_status_and_message_come_home(head: Head, tmp_path: Path, tiny_backbone: str) -> None:
    (tmp_path / "collection.tsv").write_text("no tab\n")
    for name in ("queries", "qrels"):
        (tmp_path / f"{name}.train.tsv").write_text("")
    done = head.call("train", *sets(overrides(tmp_path, tiny_backbone, str(tmp_path))), "--cluster", head.url, "--json")
    assert done.returncode == 2, done.stderr
    assert "collection.tsv:1: a line without a tab" in done.stderr and done.stdout == ""


@pytest.mark.soak
def test_a_job_is_left_found_again_and_stopped(
    head: Head, tmp_path: Path, tiny_backbone: str, tiny_collection: str
) -> None:
    """--detach, a second job of the same run refused, status, attach, Ctrl-C: the job keeps its checkpoints."""
    changes = ("teacher.steps=1000000", "teacher.checkpoint_every=5")
    values = sets(overrides(tmp_path, tiny_backbone, tiny_collection, *changes))
    sent = head.call("train", *values, "--cluster", head.url, "--detach", "--json")
    assert sent.returncode == 0, sent.stderr
    job = json.loads(sent.stdout)["job"]
    again = head.call("train", *values, "--cluster", head.url)
    assert again.returncode == 2 and "is already running there" in again.stderr and job in again.stderr
    checkpoints = tmp_path / "tiny" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("teacher-*/step-*")))
    status = json.loads(head.call("status", head.url, "--json").stdout)
    assert [n["head"] for n in status["nodes"]] == [True] and status["nodes"][0]["resources"]["CPU"] == 2
    assert {j["job"]: j["status"] for j in status["jobs"]}[job] == "RUNNING"
    process = head.start("attach", head.url)
    said: list[str] = []
    threading.Thread(target=lambda: said.extend(process.stderr), daemon=True).start()  # type: ignore[arg-type]
    wait_for(lambda: any("teacher: starting" in line for line in said))
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, said
    assert any("interrupted; the same command goes on" in line for line in said), said
    assert list(checkpoints.glob("teacher-*/step-*")) and not (tmp_path / "tiny" / ".lock").exists()
    status = json.loads(head.call("status", head.url, "--json").stdout)
    assert {j["job"]: j["status"] for j in status["jobs"]}[job] == "STOPPED"


@pytest.mark.soak
def test_a_wrong_token_gives_one_clear_message(head: Head) -> None:
    """By the dashboard and by the address; with a wrong token, with none, and with the right one in a file."""
    with_none = {k: v for k, v in head.environment.items() if k not in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE")}
    for environment, problem in (
        (with_none | {"RAY_AUTH_TOKEN": "wrong" * 8}, "asks for a token, and refuses ours"),
        (with_none, "asks for a token"),
    ):
        for target in (head.url, head.address):
            other = Head(head.dashboard, head.address, environment, head.home)
            done = other.call("embed", "--cluster", target, "--set", "run.storage=/tmp/nowhere")
            assert done.returncode == 2 and problem in done.stderr, done.stderr
            assert len(done.stderr.splitlines()) <= 5 and "Traceback" not in done.stderr, done.stderr
    (head.home / ".ray").mkdir(exist_ok=True)
    (head.home / ".ray" / "auth_token").write_text(head.environment["RAY_AUTH_TOKEN"])
    right = Head(head.dashboard, head.address, with_none, head.home)
    done = right.call("status", head.url, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["nodes"], done.stderr
    done = right.call("status", head.address, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["nodes"][0]["head"], done.stderr
    assert (head.home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
