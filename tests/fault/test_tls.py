"""A head with TLS and a token, both really on: who has the certificates and the token joins, nobody else does."""

from __future__ import annotations

import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckd_ray.model import ColBERT, ColBERTSettings
from tests.ray_head import started_head
from tests.support import overrides
from tests.tls import authority, signed


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What every process of this cluster has: certificates of one authority, and the token."""
    from ray.util import get_node_ip_address

    folder = tmp_path_factory.mktemp("tls")
    ca, ca_key = authority(folder, "ca")
    certificate, key = signed(folder, "machine", ca, ca_key, get_node_ip_address(), "127.0.0.1")
    mine = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH")}
    return {
        **mine, "RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": certificate, "RAY_TLS_SERVER_KEY": key,
        "RAY_TLS_CA_CERT": ca, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }  # fmt: skip


@pytest.fixture(scope="module")
def head(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of the GCS of a `ray start --head` of our own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("head")
    with started_head(folder, environment, f"--port={port}", "--include-dashboard=false"):
        yield port


def ckd_ray(environment: dict[str, str], port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ckd_ray", *arguments],
        capture_output=True, text=True, timeout=600, env={**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"},
    )  # fmt: skip


@pytest.mark.soak
def test_the_gcs_speaks_tls_and_asks_for_our_certificate(environment: dict[str, str], head: int) -> None:
    def connect(certificate: bool) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(environment["RAY_TLS_CA_CERT"])
        context.set_alpn_protocols(["h2"])
        if certificate:
            context.load_cert_chain(environment["RAY_TLS_SERVER_CERT"], environment["RAY_TLS_SERVER_KEY"])
        with socket.create_connection(("127.0.0.1", head), timeout=10) as plain:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
                return "answered" if secure.recv(9) else "closed"

    def refused() -> bool:
        try:
            return connect(certificate=False) == "closed"
        except (ssl.SSLError, ConnectionError):
            return True

    assert connect(certificate=True) == "answered" and refused()


@pytest.mark.soak
def test_a_job_runs_there(
    environment: dict[str, str], head: int, tmp_path: Path, tiny_backbone: str, tiny_collection: str
) -> None:
    settings = ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)
    ColBERT.from_backbone(tiny_backbone, settings, seed=1).save(tmp_path / "given")
    given = f"teacher.checkpoint={tmp_path / 'given'}"
    values = overrides(tmp_path, tiny_backbone, tiny_collection, given, "embed.actors=1")
    sets = [part for value in values for part in ("--set", value)]
    done = ckd_ray(environment, head, "embed", "--json", *sets)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"joined Ray at 127.0.0.1:{head}" in done.stderr
    assert json.loads(done.stdout)["stages"][-1]["figures"]["count"] == 60
    recorded = (tmp_path / "tiny" / "run.json").read_text()
    assert environment["RAY_AUTH_TOKEN"] not in done.stderr + done.stdout + recorded


def checks(environment: dict[str, str], port: int) -> dict[str, Any]:
    done = ckd_ray(environment, port, "doctor", "--json")
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


@pytest.mark.soak  # Ray takes its time to give up on a head that does not answer in the clear
def test_doctor_sees_it_and_who_lacks_the_certificates_or_the_token_is_refused(
    environment: dict[str, str], head: int
) -> None:
    seen = checks(environment, head)
    assert seen["tls"]["state"] == seen["running ray"]["state"] == "ok" and "2 CPU" in seen["running ray"]["found"]
    plain = {k: v for k, v in environment.items() if not k.startswith(("RAY_TLS", "RAY_USE_TLS"))}
    assert checks(plain, head)["running ray"]["state"] == "fail"
    stranger = checks({**environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)}, head)
    assert "refuses our token" in stranger["running ray"]["found"]
