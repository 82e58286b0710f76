"""`ckd-ray doctor` on states that are really broken: what it says, and that it says what to do."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from ckd_ray.checks import load_config
from ckd_ray.doctor import (
    access as check_access,
    machine as check_machine,
    ray_version as check_ray,
    target as check_target,
    tls as check_tls,
)
from ckd_ray.doctor.check import Check, as_json, render
from ckd_ray.ray_util.target import parse_target


def only(checks: Iterator[Check], name: str | None = None) -> Check:
    (found,) = [check for check in checks if name is None or check.name == name]
    return found


def test_advice_stands_below_what_is_not_ok() -> None:
    checks = [Check("a", "ok", "fine"), Check("longer", "fail", "broken", "mend it")]
    assert render(checks).splitlines() == ["ok    a       fine", "fail  longer  broken", "              -> mend it"]
    assert as_json(checks)["ok"] is False and as_json(checks[:1])["ok"] is True
    with pytest.raises(AssertionError, match="without advice"):
        Check("a", "warn", "odd")


def test_libraries_against_their_ranges() -> None:
    assert ">=2." in check_machine.declared()["ray"] and "moto" not in check_machine.declared()
    assert check_machine.library("ray", ">=2.50").state == "ok"
    old = check_machine.library("ray", ">=99")
    assert old.state == "fail" and "supported is >=99" in old.found and old.fix == "pip install 'ray>=99'"
    assert check_machine.library("no-such-library", ">=1").fix == "pip install 'no-such-library>=1'"


def test_extras_are_asked_for_by_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, ["collection.format=ir_datasets", "collection.path=msmarco-passage"])
    monkeypatch.setattr(check_machine, "_EXTRAS", {"no_such_module": "datasets", "ir_datasets": "datasets"})
    checks = list(check_machine.extras(config))
    assert "not installed: no_such_module (ckd-ray[datasets])" in checks[-1].found
    real = check_machine.importlib.util.find_spec
    monkeypatch.setattr(
        check_machine.importlib.util, "find_spec", lambda name: None if name == "ir_datasets" else real(name)
    )
    assert only(check_machine.extras(config), "datasets").fix == "pip install 'ckd-ray[ir]'"


def test_memory_and_processor_of_other_machines(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("MemTotal:  4194304 kB\nMemFree: 1 kB\nMemAvailable: 2097152 kB\n")
    check = only(check_machine.memory(str(tmp_path / "small")))
    assert check.state == "warn" and check.found == "4.0 GiB, 2.0 available"
    (tmp_path / "cpu").write_text("processor: 0\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor: 1\nflags: fpu\n")
    assert check_machine.cpu_flags(str(tmp_path / "cpu")) == {"fpu", "avx2", "avx512_vnni"}
    assert check_machine.cpu_flags(str(tmp_path / "nothing")) == set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB, where we may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_and_small_shared_memory(small_disk: Path) -> None:
    written, room = check_access.storage(str(small_disk / "runs"))
    assert written.state == "ok" and not (small_disk / "runs").exists() and not list(small_disk.iterdir())
    assert room.state == "fail" and "0.0 GiB free" in room.found and "make room" in str(room.fix)
    memory = only(check_machine.shared_memory(str(small_disk)))
    assert memory.state == "fail" and "--shm-size" in str(memory.fix)
    (small_disk / "full").write_bytes(bytes(32 * 2**20))
    full = only(check_access.storage(str(small_disk / "runs")))
    assert full.state == "fail" and "No space left" in full.found


def test_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = only(check_access.storage(str(tmp_path / "file" / "runs")))
    assert check.state == "fail" and "Not a directory" in check.found and "run.storage" in str(check.fix)
    if os.geteuid() == 0:
        check = only(check_access.storage("/proc/ckd-ray"))  # where not even root may
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        check = only(check_access.storage(str(tmp_path / "closed" / "runs")))
    assert check.state == "fail" and "cannot be written" in check.found
    assert only(check_access.storage("nonsense://x")).state == "fail"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and never listens; nobody else can take the port meanwhile
        port = closed.getsockname()[1]
        gone = only(check_access.storage(f"s3://key:secret@b/r?scheme=http&endpoint_override=127.0.0.1:{port}"))
    assert gone.state == "fail" and "nothing answers there" in str(gone.fix)


def test_storage_on_s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("CKD_RAY_CACHE", str(tmp_path / "cache"))
    try:
        uri = f"s3://key:secret@doctor/runs?scheme=http&endpoint_override={host}:{port}"
        missing = only(check_access.storage(uri))
        assert missing.state == "fail" and "make the bucket" in str(missing.fix)
        made = only(check_access.storage(f"{uri}&allow_bucket_creation=true"))
        assert made.state == "fail", "a probe makes no buckets"
        import pyarrow.fs as pafs

        fs, _ = pafs.FileSystem.from_uri(f"{uri}&allow_bucket_creation=true")
        fs.create_dir("doctor")
        assert only(check_access.storage(uri)).state == "ok"
        left = fs.get_file_info(pafs.FileSelector("doctor", recursive=True))
        assert [i.path for i in left if i.type == pafs.FileType.File] == []
        assert only(check_access.clock(uri)).found.endswith(f"http://{host}:{port}")
        assert only(check_access.scratch(uri), "cache").found.endswith(str(tmp_path / "cache"))
    finally:
        server.stop()


class Clock(http.server.BaseHTTPRequestHandler):
    """Tells a time of its own, and refuses, as an object store does."""

    off = 0.0

    def do_HEAD(self) -> None:
        self.send_response_only(403)
        self.send_header("Date", formatdate(time.time() - self.off, usegmt=True))
        self.end_headers()

    def do_GET(self) -> None:
        body = b'{"error": "Unauthorized: Missing authentication token"}'
        self.send_response_only(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[int]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Clock)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.mark.parametrize(("off", "state"), [(0, "ok"), (120, "warn"), (-3600, "fail")])
def test_the_clock_is_compared_with_the_storage_s(
    web: int, off: float, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "off", off)
    check = only(check_access.clock(f"s3://key:secret@b/r?scheme=http&endpoint_override=127.0.0.1:{web}"))
    assert check.state == state and "secret" not in check.found
    assert ("behind" in check.found) == (off < 0)


def test_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    assert check_access.endpoint_of("s3://b/x?region=eu-west-1") == "https://s3.eu-west-1.amazonaws.com"
    assert check_access.endpoint_of("gs://b/x") == "https://storage.googleapis.com"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    assert check_access.endpoint_of("s3://b/x") == "http://minio:9000"
    assert check_access.endpoint_of("hdfs://b/x") is None
    assert "nothing to compare it with" in only(check_access.clock("runs")).found


def test_the_token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert only(check_access.token()).state == "warn"
    path.write_text("abc")
    path.chmod(0o644)
    open_to_all = only(check_access.token())
    assert open_to_all.state == "fail" and "0644" in open_to_all.found and open_to_all.fix == f"chmod 600 {path}"
    subprocess.run(str(open_to_all.fix), shell=True, check=True)  # the advice is the cure
    assert only(check_access.token()).state == "ok"
    path.write_text("\n")
    assert "is empty" in only(check_access.token()).found
    path.unlink()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    assert only(check_access.token()).found == "RAY_AUTH_TOKEN"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert [check.state for check in check_access.token()] == ["fail", "ok"]


def test_ports(web: int) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        number = taken.getsockname()[1]
        check = check_ray.port(number, None, "ray start --head --port=")
        assert check.state == "fail" and f":{number}" in str(check.fix) and "--port=ANOTHER" in str(check.fix)
        assert check_ray.port(number, "Ray", "").state == "ok"
        if os.path.exists("/proc/net/tcp"):
            assert check_ray.world(number).state == "fail"
    assert check_ray.port(number, None, "").found == "free" and check_ray.world(number).state == "ok"
    assert check_ray.world(web).state == "ok", "on loopback"
    assert check_ray.dashboard(web) == "a Ray that asks for a token" and check_ray.dashboard(number) is None


def test_the_machine_s_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for address, states in (("127.0.1.1", ("warn", "fail")), ("10.0.0.7", ("ok", "ok"))):
        monkeypatch.setattr(check_machine.socket, "gethostbyname", lambda name, found=address: found)
        for several, state in zip((False, True), states, strict=True):
            assert only(check_machine.hostname(several_machines=several)).state == state

    def unknown(name: str) -> str:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(check_machine.socket, "gethostbyname", unknown)
    assert "has no address" in only(check_machine.hostname()).found


def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util import get_node_ip_address

    from tests.tls import authority, signed

    address = get_node_ip_address()
    ca, ca_key = authority(tmp_path, "ca")
    good = signed(tmp_path, "good", ca, ca_key, address)
    other = signed(tmp_path, "other", ca, ca_key, "192.0.2.77")
    foreign, _ = authority(tmp_path, "foreign")
    assert check_tls.handshake(*good, ca, address) is None
    assert "IP address mismatch" in str(check_tls.handshake(*other, ca, address))
    assert "unable to get local issuer" in str(check_tls.handshake(*good, foreign, address))
    assert check_tls.handshake(good[0], other[1], ca, address) is not None, "another's key"

    monkeypatch.setenv("RAY_USE_TLS", "0")
    assert only(check_tls.transport_encryption()).state == "ok"
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", good[0])
    monkeypatch.setenv("RAY_TLS_CA_CERT", ca)
    monkeypatch.delenv("RAY_TLS_SERVER_KEY", raising=False)
    assert "RAY_TLS_SERVER_KEY=''" in only(check_tls.transport_encryption()).found
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", good[1])
    assert only(check_tls.transport_encryption()).state == "ok"
    os.chmod(good[1], 0o644)
    assert only(check_tls.transport_encryption()).fix == f"chmod 600 {good[1]}"


def test_a_cluster_that_jobs_are_sent_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(text: str) -> Check:
        target = parse_target(text)
        assert target is not None
        return only(check_target.cluster(target))

    folder = Path(__file__).parents[2] / "cluster"
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")
    assert look(str(folder / "local.yaml")).state == "ok"
    unfilled = look(str(folder / "gcp.yaml"))
    assert unfilled.state == "fail" and "provider.project_id" in unfilled.found
    silent = look("http://127.0.0.1:1")
    assert silent.state == "fail" and "no dashboard answers here" in silent.found


def test_the_ray_that_is_named_is_looked_at_and_none_for_local() -> None:
    named = check_ray.running_ray(parse_target("127.0.0.1:1")).check
    assert named.state == "fail" and named.found.startswith("--cluster=127.0.0.1:1: ")
    assert check_ray.running_ray(parse_target("local")).check.state == "ok"


def test_the_command(tmp_path: Path) -> None:
    """One object on standard output; 1 when a check failed, and the failed ones named."""
    (tmp_path / "token").write_text("abc")
    (tmp_path / "token").chmod(0o644)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    environment |= {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "RAY_TMPDIR": str(tmp_path)}
    environment |= {"RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-m", "ckd_ray", "doctor", "--json", "--set", f"run.storage={tmp_path}"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    value = json.loads(done.stdout)
    states = {check["name"]: check["state"] for check in value["checks"]}
    assert value["ok"] is False and states["token"] == states["running ray"] == "fail" and states["storage"] == "ok"
    assert "token" in done.stderr and "running ray" in done.stderr and "Traceback" not in done.stderr
    assert all(check["fix"] for check in value["checks"] if check["state"] != "ok")
