"""Checks of Ray: its ports, who can reach them, and a Ray that runs already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckd_ray.doctor.check import Check
from ckd_ray.ray_util.sockets import answers, knock
from ckd_ray.ray_util.target import Target

GCS_PORT, DASHBOARD_PORT = 6379, 8265
_PATIENCE_S = 45
_LOOK = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=40)
nodes = sum(node["Alive"] for node in ray.nodes())
print(json.dumps({"nodes": nodes, "have": ray.cluster_resources(), "free": ray.available_resources()}), flush=True)
ray.shutdown()
"""
_TABLES, _LISTENS = ("/proc/net/tcp", "/proc/net/tcp6"), "0A"
_ANY = ("00000000", "0" * 32)


@dataclass(frozen=True)
class Joined:
    """The Ray that `ckd-ray` would join: its address if one runs, the number of its machines, and the check."""

    address: str | None
    nodes: int
    check: Check


def running_ray(target: Target | None = None) -> Joined:
    """Join the Ray that `ckd-ray` would join (--cluster, RAY_ADDRESS, or the one of this machine), and leave again."""
    from ckd_ray.ray_util.token import use_token

    use_token()
    from ray._private.utils import read_ray_address

    if target is not None and target.kind == "local":
        return Joined(None, 0, Check("running ray", "ok", "not needed; --cluster local starts Ray in place"))
    given, source = os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS"
    if target is not None and target.kind == "address":
        given, source = target.text, "--cluster"
    address = given or read_ray_address()
    if not address:
        return Joined(None, 0, Check("running ray", "ok", "none; ckd-ray starts Ray in place"))
    fix = f"start it (ray start --head), leave {source} out, or give both sides the same token (~/.ray/auth_token)"
    try:
        knock(address)
    except OSError as error:
        if given:
            return Joined(address, 0, Check("running ray", "fail", f"{source}={address}: {error}", fix))
        return Joined(None, 0, Check("running ray", "ok", f"none; the one at {address} does not run any more"))
    seen = _seen_from_a_child(address)
    if "error" in seen:
        return Joined(address, 0, Check("running ray", "fail", f"{address} cannot be joined: {seen['error']}", fix))
    have, free, nodes = seen["have"], seen["free"], seen["nodes"]
    parts = [f"{free.get(name, 0):g} of {have[name]:g} {name} free" for name in ("CPU", "GPU") if have.get(name)]
    found = f"{address}: {nodes} machine{'s' if nodes != 1 else ''}; {', '.join(parts) or 'no CPU'}"
    if not have.get("CPU"):
        return Joined(address, nodes, Check("running ray", "fail", found, "start it with CPUs, or add machines"))
    return Joined(address, nodes, Check("running ray", "ok", found))


def _seen_from_a_child(address: str) -> dict[str, Any]:
    """What a child process sees when it joins. A child can be killed; Ray waits minutes for a head that refuses us."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOOK, address], capture_output=True, text=True, timeout=_PATIENCE_S, env=os.environ
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
        return {"error": _refusal(printed) or f"it accepted no driver within {_PATIENCE_S} s"}
    if done.returncode == 0:
        value: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
        return value
    lines = done.stderr.strip().splitlines() or ["no message"]
    return {"error": _refusal(done.stderr) or lines[-1][:200]}


def _refusal(printed: str) -> str | None:
    return "it refuses our token" if "InvalidAuthToken" in printed or "Unauthenticated" in printed else None


def ports(joined: Joined) -> Iterator[Check]:
    """The two ports of `ray start --head`: free, or held by a Ray; and the dashboard on loopback only."""
    held = joined.address is not None and joined.address.endswith(f":{GCS_PORT}")
    yield port(GCS_PORT, "Ray" if held else None, "ray start --head --port=")
    yield port(DASHBOARD_PORT, dashboard(DASHBOARD_PORT), "ray start --head --dashboard-port=")
    yield world(DASHBOARD_PORT)


def port(number: int, holder: str | None, command: str) -> Check:
    """Whether the port is free, or held by the Ray that is named as its `holder`."""
    name = f"port {number}"
    if not answers(number):
        return Check(name, "ok", "free")
    if holder is not None:
        return Check(name, "ok", f"held by {holder}")
    fix = f"end the program that listens there (ss -ltnp 'sport = :{number}'), or {command}ANOTHER"
    return Check(name, "fail", "taken by another program", fix)


def dashboard(number: int) -> str | None:
    """The version of the Ray whose dashboard answers there; None for another program."""
    url = f"http://127.0.0.1:{number}/api/version"
    try:
        with urllib.request.urlopen(url, timeout=3) as answer:
            value: Any = json.load(answer)
        return f"Ray {value['ray_version']}"
    except urllib.error.HTTPError as error:
        return "a Ray that asks for a token" if error.code in (401, 403) and b"oken" in error.read(4096) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def world(number: int) -> Check:
    """Whether the port of the dashboard, which runs every job that it is sent, is open to other machines."""
    name = f"port {number} from outside"
    if any(address in _ANY for address, at in listening() if at == number):
        fix = "start Ray with --dashboard-host=127.0.0.1, and reach it through SSH"
        return Check(name, "fail", f"a program listens on 0.0.0.0:{number}", fix)
    return Check(name, "ok", "closed")


def listening() -> Iterator[tuple[str, int]]:
    """(address in the hexadecimal form of the kernel, port) of every socket that listens."""
    for table in _TABLES:
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 3 and fields[3] == _LISTENS:
                address, _, number = fields[1].partition(":")
                yield address, int(number, 16)
