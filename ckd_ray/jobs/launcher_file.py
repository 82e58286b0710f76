"""A cluster launcher's YAML: read it, check it before anything costs money, and describe it with its price."""

from __future__ import annotations

import difflib
import io
import logging
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ckd_ray.errors import UserError
from ckd_ray.jobs.prices import PRICES_VARIABLE, hourly
from ckd_ray.ray_util.sockets import LOOPBACK

_DASHBOARD = re.compile(r"--dashboard-host(?:=|\s+)[\"']?([^\s\"';]+)")
_WORLD = ("0.0.0.0/0", "::/0")
_TOKEN_NAME = "auth_token"


@dataclass(frozen=True)
class NodeType:
    """A type of machines, and how many workers of it there are; the head is not counted."""

    name: str
    machine: str | None
    spot: bool
    least: int
    most: int
    accelerators: dict[str, int] = field(default_factory=dict)

    @property
    def usd_per_hour(self) -> float | None:
        """Price of one machine; None where it is unknown."""
        return hourly(self.machine, spot=self.spot, accelerators=self.accelerators) if self.machine else None


@dataclass(frozen=True)
class LauncherFile:
    """The YAML at `path`; `prepared` has Ray's defaults filled in."""

    path: str
    prepared: dict[str, Any]

    @property
    def provider(self) -> str:
        """`aws`, `gcp`, `local`, ..."""
        return str(self.prepared["provider"]["type"])

    @property
    def own_machines(self) -> bool:
        """Whether the machines are the user's own, without a price."""
        return self.provider == "local"

    @property
    def head(self) -> NodeType:
        """The head's type; its counts are those of workers of the same type."""
        return self.node_type(self.prepared["head_node_type"])

    @property
    def workers(self) -> list[NodeType]:
        """The types of which there may be workers."""
        types = [self.node_type(name) for name in self.prepared["available_node_types"]]
        return [kind for kind in types if kind.most > 0]

    @property
    def least_nodes(self) -> int:
        """The head and the least number of workers."""
        return 1 + sum(kind.least for kind in self.workers)

    @property
    def most_nodes(self) -> int:
        """The head and the greatest number of workers."""
        return 1 + min(int(self.prepared["max_workers"]), sum(kind.most for kind in self.workers))

    @property
    def token_source(self) -> Path | None:
        """The local file that the launcher copies to the machines as their token."""
        mounts: dict[str, str] = self.prepared.get("file_mounts") or {}
        found = [local for remote, local in mounts.items() if remote.rstrip("/").endswith(f".ray/{_TOKEN_NAME}")]
        return Path(found[0]).expanduser() if found else None

    def node_type(self, name: str) -> NodeType:
        """The node type of that name in `available_node_types`."""
        values = self.prepared["available_node_types"][name]
        node = values.get("node_config") or {}
        least = int(values.get("min_workers") or 0)
        most = int(values.get("max_workers", 0 if name == self.prepared["head_node_type"] else least) or 0)
        attached = node.get("guestAccelerators") or []
        return NodeType(
            name=name,
            machine=node.get("InstanceType") or _last_part(node.get("machineType")),
            spot=_is_spot(node),
            least=least,
            most=min(most, int(self.prepared["max_workers"])),
            accelerators={str(_last_part(a["acceleratorType"])): int(a["acceleratorCount"]) for a in attached},
        )


def read_launcher_file(path: str, *, strict: bool = True) -> LauncherFile:
    """The file, checked by Ray's schema and (`strict`) for what would let strangers in.

    Raises:
        UserError: with the file and the key.
    """
    raw = _read(path)
    prepared = _prepared(path, raw)
    for key, problem, fix in _unsafe(prepared) if strict else ():
        raise UserError(problem, where=f"{path}: {key}", fix=fix)
    return LauncherFile(path, prepared)


def _read(path: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("this file cannot be read", where=path, found=str(error)) from None
    except yaml.YAMLError as error:
        raise UserError("not valid YAML", where=path, found=" ".join(str(error).split())) from None
    if not isinstance(value, dict) or "provider" not in value or "cluster_name" not in value:
        raise UserError(
            "this is not a cluster launcher's file",
            where=path,
            expected="a YAML with cluster_name, provider, auth, ...; see cluster/ for examples",
        )
    if not isinstance(value["provider"], dict) or not isinstance(value["provider"].get("type"), str):
        raise UserError(
            "the kind of machines is missing", where=f"{path}: provider.type", expected="aws, gcp, local, ..."
        )
    return value


def _prepared(path: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Ray's defaults filled in, then checked by Ray's schema, which the file alone does not satisfy."""
    import click
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)
            prepared: dict[str, Any] = prepare_config(raw)
            validate_config(prepared)
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path)) or "the file"
        raise UserError(f"{error.message[:300]}{_nearest(error)}", where=f"{path}: {where}") from None
    except click.ClickException as error:
        raise UserError(error.format_message(), where=path) from None
    except (ValueError, RuntimeError, NotImplementedError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the launcher cannot use this file: {error}", where=path) from None
    return prepared


def _nearest(error: Any) -> str:
    if error.validator != "additionalProperties" or not isinstance(error.instance, dict):
        return ""
    valid = list(error.schema.get("properties", {}))
    for name in error.instance:
        close = difflib.get_close_matches(str(name), valid, 1) if name not in valid else []
        if close:
            return f"; did you mean {close[0]}?"
    return ""


def _commands(prepared: dict[str, Any], *keys: str) -> list[str]:
    return [str(command) for key in keys for command in prepared.get(key) or []]


def _unsafe(prepared: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(key, problem, fix) of everything that would let strangers in."""
    starts = {
        key: [c for c in _commands(prepared, key) if re.search(r"\bray start\b", c)]
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
    }
    for key, commands in starts.items():
        for host in (host for command in commands for host in _DASHBOARD.findall(command)):
            if host not in LOOPBACK:
                yield (
                    key,
                    f"--dashboard-host {host} opens the dashboard, which runs every job sent to it, to the network",
                    "write --dashboard-host=127.0.0.1; ckd-ray reaches it through SSH. Ray's own default start"
                    " commands open it, so the file must have commands of its own",
                )
    setup = _commands(prepared, "initialization_commands", "setup_commands", "head_setup_commands")
    for key, commands in starts.items():
        for command in commands:
            if "RAY_AUTH_MODE=token" not in command and not any("RAY_AUTH_MODE=token" in c for c in setup):
                yield key, "Ray would start without asking for a token", "write RAY_AUTH_MODE=token before `ray start`"
    mounts = prepared.get("file_mounts") or {}
    everything = " ".join([*mounts, *setup, *_commands(prepared, *starts)])
    if _TOKEN_NAME not in everything and "RAY_AUTH_TOKEN" not in everything:
        yield "file_mounts", "no token reaches the machines", 'add "~/.ray/auth_token": ~/.ray/auth_token'


def warnings(launcher: LauncherFile) -> list[str]:
    """What is allowed, but may cost or expose more than the user expects."""
    provider, found = launcher.prepared["provider"], []
    if launcher.provider == "aws":
        rules = (provider.get("security_group") or {}).get("IpPermissions")
        world = [
            r for rule in rules or [] for r in (rule.get("IpRanges") or []) + (rule.get("Ipv6Ranges") or [])
            if r.get("CidrIp", r.get("CidrIpv6")) in _WORLD
        ]  # fmt: skip
        types = launcher.prepared["available_node_types"].values()
        own = any("SecurityGroupIds" in (t.get("node_config") or {}) for t in types)
        if world:
            found.append("provider.security_group is open to the whole internet; name your own address range")
        elif rules is None and not own:
            found.append("without provider.security_group.IpPermissions, SSH is open to the whole internet")
        if provider.get("cache_stopped_nodes", True):
            found.append(
                "provider.cache_stopped_nodes is on: `down` only stops machines, and their disks still cost money"
            )
    return found


def describe(launcher: LauncherFile) -> list[str]:
    """Lines for people: the machines, their numbers, spot or on demand, and the least and greatest price an hour."""
    name = launcher.prepared["cluster_name"]
    lines = [f"cluster {name} ({launcher.provider}), from {launcher.path}"]
    if launcher.own_machines:
        provider = launcher.prepared["provider"]
        lines.append(f"  head      {provider.get('head_ip', 'by the coordinator')}")
        ips = provider.get("worker_ips")
        lines.append(f"  workers   {', '.join(ips) if ips else launcher.most_nodes - 1}")
        return lines
    head = launcher.head
    width = max(9, *(len(kind.name) for kind in launcher.workers)) if launcher.workers else 9
    lines.append(f"  {'head':<{width}} 1 x {_machine(head)}")
    for kind in launcher.workers:
        count = f"{kind.least}" if kind.least == kind.most else f"{kind.least} to {kind.most}"
        lines.append(f"  {kind.name:<{width}} {count} x {_machine(kind)}")
    low, high = cost_per_hour(launcher)
    if low is None or high is None:
        lines.append(f"  {'cost':<{width}} unknown ({PRICES_VARIABLE}=FILE.yaml names a file of your prices)")
    else:
        span = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
        lines.append(f"  {'cost':<{width}} about {span} USD an hour by your prices, without disks and traffic")
    return lines


def cost_per_hour(launcher: LauncherFile) -> tuple[float | None, float | None]:
    """USD an hour with the fewest and with the most machines; None where a price is unknown."""
    head = launcher.head.usd_per_hour
    priced = [(kind.usd_per_hour, kind) for kind in launcher.workers]
    if head is None or any(price is None for price, _ in priced):
        return None, None
    low = head + sum((price or 0.0) * kind.least for price, kind in priced)
    room, high = launcher.most_nodes - 1, head
    for price, kind in sorted(priced, key=lambda pair: -(pair[0] or 0.0)):
        high += (price or 0.0) * min(kind.most, room)
        room -= min(kind.most, room)
    return low, high


def _machine(kind: NodeType) -> str:
    attached = "".join(f" + {count} {name}" for name, count in kind.accelerators.items())
    price = "price unknown" if kind.usd_per_hour is None else f"about {kind.usd_per_hour:.2f} USD an hour each"
    return f"{kind.machine or 'an unnamed machine type'}{attached}, {'spot' if kind.spot else 'on demand'}, {price}"


def _is_spot(node: dict[str, Any]) -> bool:
    options = node.get("InstanceMarketOptions") or {}
    scheduling = node.get("scheduling") or []
    rows = scheduling if isinstance(scheduling, list) else [scheduling]
    return options.get("MarketType") == "spot" or any(
        row.get("preemptible") is True or row.get("provisioningModel") == "SPOT" for row in rows
    )


def _last_part(value: str | None) -> str | None:
    """GCP's names are addresses: projects/P/zones/Z/acceleratorTypes/nvidia-tesla-t4."""
    return value.rsplit("/", 1)[-1] if value else None
