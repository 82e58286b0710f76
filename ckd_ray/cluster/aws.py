"""What Ray's launcher leaves open on AWS is closed before a machine starts; and what in aws.yaml is to be filled in."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from ckd_ray.errors import JobError, UserError

NO_IMAGE = "ami-00000000000000000"
# RFC 5737: addresses for documentation, which nobody has.
_NOBODY = ("192.0.2.", "198.51.100.", "203.0.113.")
# The launcher's own mark on what it has made.
_MADE_BY_RAY = "ray-autoscaler"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
Rule = tuple[str, int, int, str]


def check_filled_in(config: dict[str, Any], where: str) -> None:
    """Refuse a file of which the marked values are still those that we ship.

    Args:
        config: a launcher's file; others than AWS pass.
        where: its path, for the message.

    Raises:
        UserError: names every such key, and how to find its value.
    """
    found = list(_not_filled_in(config)) if config["provider"]["type"] == "aws" else []
    if found:
        raise UserError(
            "values of this file are still to be filled in",
            where=where,
            found="; ".join(key for key, _ in found),
            fix="; ".join(dict.fromkeys(fix for _, fix in found)),
        )


def _not_filled_in(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, kind in config["available_node_types"].items():
        if (kind.get("node_config") or {}).get("ImageId") == NO_IMAGE:
            yield (
                f"available_node_types.{name}.node_config.ImageId",
                "an image with NVIDIA's driver in your region (the comment in cluster/aws.yaml has the command)",
            )
    if any(address.startswith(_NOBODY) for _, _, _, address in _rules(_wanted(config) or [])):
        yield (
            "provider.security_group.IpPermissions",
            "your own address (curl https://checkip.amazonaws.com) and /32 behind it",
        )


def close_to_the_world(config: dict[str, Any]) -> list[str]:
    """Make the cluster's security group admit what `provider.security_group.IpPermissions` says, and nobody else.

    Ray's launcher puts SSH from 0.0.0.0/0 beside those rules when it fills a new group, and never touches a group that
    has rules, so an address that has changed since would stay out. To be called before every launch, with what
    `read_launcher_file` has checked; the group, key pair and profile are then there, and no machine yet.

    Returns:
        One line a change, for people. Nothing for other providers, for a file without such rules (the launcher's own
        then hold), and for groups that the file names by id or that the launcher has not made.

    Raises:
        UserError: boto3 is not installed. JobError: AWS refuses, or cannot be reached.
    """
    wanted = _wanted(config)
    if wanted is None or config["provider"]["type"] != "aws":
        return []
    told: list[str] = []
    with _errors_of_aws():
        import boto3
        from ray.autoscaler.sdk import bootstrap_config

        made = bootstrap_config(config, no_config_cache=True)
        own = {kind["node_config"]["SecurityGroupIds"][0] for kind in made["available_node_types"].values()}
        credentials = config["provider"].get("aws_credentials") or {}
        ec2 = boto3.client("ec2", region_name=config["provider"]["region"], **credentials)
        for group in ec2.describe_security_groups(GroupIds=sorted(own))["SecurityGroups"]:
            if any(tag["Key"] == _MADE_BY_RAY for tag in group.get("Tags", [])):
                told += _match(ec2, group, set(_rules(wanted)))
    return told


@contextmanager
def _errors_of_aws() -> Iterator[None]:
    """What goes wrong, in a line; what the launcher prints meanwhile is dropped, but for its last line then."""
    import click

    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise UserError(
            "the launcher needs boto3 for AWS", found=str(error), fix="pip install 'ckd-ray[cluster,aws]'"
        ) from None
    told = io.StringIO()
    try:
        with redirect_stdout(told), redirect_stderr(told):
            yield
    except (click.ClickException, BotoCoreError, ClientError) as error:
        said = str(error).strip() or _COLOUR.sub("", told.getvalue().strip().rpartition("\n")[2])
        raise JobError(f"AWS: {' '.join(said.split())}") from error


def _wanted(config: dict[str, Any]) -> list[dict[str, Any]] | None:
    rules: list[dict[str, Any]] | None = (config["provider"].get("security_group") or {}).get("IpPermissions")
    return rules


def _rules(permissions: list[dict[str, Any]]) -> Iterator[Rule]:
    """(protocol, first port, last port, addresses) of every range; those between machines of the group are left out."""
    for one in permissions:
        ports = (one["IpProtocol"], one.get("FromPort", -1), one.get("ToPort", -1))
        for key, address in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6")):
            for addresses in one.get(key) or []:
                yield (*ports, addresses[address])


def _match(ec2: Any, group: dict[str, Any], wanted: set[Rule]) -> list[str]:
    have = set(_rules(group["IpPermissions"]))
    extra, missing = sorted(have - wanted), sorted(wanted - have)
    if extra:
        ec2.revoke_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[_permission(r) for r in extra])
    if missing:
        ec2.authorize_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[_permission(r) for r in missing])
    name = group["GroupName"]
    closed = [f"security group {name}: closed to {rule[3]} ({_ports(rule)})" for rule in extra]
    return closed + [f"security group {name}: open to {rule[3]} ({_ports(rule)})" for rule in missing]


def _permission(rule: Rule) -> dict[str, Any]:
    protocol, first, last, addresses = rule
    ranges = {"Ipv6Ranges": [{"CidrIpv6": addresses}]} if ":" in addresses else {"IpRanges": [{"CidrIp": addresses}]}
    ports = {} if protocol == "-1" else {"FromPort": first, "ToPort": last}
    return {"IpProtocol": protocol, **ports, **ranges}


def _ports(rule: Rule) -> str:
    protocol, first, last, _ = rule
    if protocol == "-1":
        return "everything"
    return f"{protocol} {first}" if first == last else f"{protocol} {first}-{last}"
