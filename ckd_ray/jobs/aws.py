"""AWS: the values of aws.yaml that the user fills in, and what Ray's launcher does not set up itself."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from ckd_ray.errors import JobError, UserError

NO_IMAGE = "ami-00000000000000000"
# RFC 5737: addresses for documentation, which no machine has.
_EXAMPLE_ADDRESSES = ("192.0.2.", "198.51.100.", "203.0.113.")
# The launcher's tag and prefix on what it has made.
_MADE_BY_RAY = "ray-autoscaler"
PASS_ITSELF = "ckd-ray-pass-itself"
WITHOUT_IAM = (
    "ask somebody who may write IAM for a role with the policy of cluster/aws-policy.json, and name its profile in the"
    " file (docs/how-to/cluster.md, Without the right to write IAM)"
)
_MAY_NOT = re.compile(r"AccessDenied|UnauthorizedOperation|not authorized to perform")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
Rule = tuple[str, int, int, str]


def not_filled_in(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what belongs there) of the values of cluster/aws.yaml that the user has not filled in."""
    for name, kind in config["available_node_types"].items():
        if (kind.get("node_config") or {}).get("ImageId") == NO_IMAGE:
            yield (
                f"available_node_types.{name}.node_config.ImageId",
                "an image with NVIDIA's driver in your region (the comment in cluster/aws.yaml has the command)",
            )
    if any(address.startswith(_EXAMPLE_ADDRESSES) for _, _, _, address in rules(wanted_rules(config) or [])):
        yield (
            "provider.security_group.IpPermissions",
            "your own address (curl https://checkip.amazonaws.com), followed by /32",
        )


def prepare_account(config: dict[str, Any]) -> list[str]:
    """Close the cluster's security group to the world, and let its head start workers that have the head's role.

    Call it before every launch, with what `read_launcher_file` has checked. Afterwards the group, the key pair and the
    profile exist, and no machine does. Two things need it:

    - Ray's launcher adds SSH from 0.0.0.0/0 to the rules of `provider.security_group.IpPermissions` when it fills a new
      group. It never changes a group that has rules, so a new address of the user's would stay out.
    - The role that it makes for the head may start machines, but may not pass a role to them, so AWS would refuse
      workers with an `IamInstanceProfile`.

    Returns:
        One line for people for each change; none for other providers. A file without rules keeps the launcher's own.
        Groups that the file names by id, and groups and roles that the launcher has not made, do not change.

    Raises:
        UserError: boto3 is not installed, or the role may not be changed. JobError: AWS refuses, or cannot be reached.
    """
    wanted = wanted_rules(config)
    if config["provider"]["type"] != "aws" or (wanted is None and not head_passes_itself(config)):
        return []
    changes: list[str] = []
    with _errors_of_aws():
        import boto3
        from ray.autoscaler.sdk import bootstrap_config

        made = bootstrap_config(config, no_config_cache=True)
        credentials = config["provider"].get("aws_credentials") or {}

        def client(service: str) -> Any:
            return boto3.client(service, region_name=config["provider"]["region"], **credentials)

        if wanted is not None:
            ec2 = client("ec2")
            own = {kind["node_config"]["SecurityGroupIds"][0] for kind in made["available_node_types"].values()}
            for group in ec2.describe_security_groups(GroupIds=sorted(own))["SecurityGroups"]:
                if any(tag["Key"] == _MADE_BY_RAY for tag in group.get("Tags", [])):
                    changes += _update_group(ec2, group, set(rules(wanted)))
        profile = launcher_s_profile(config)
        if profile is not None and head_passes_itself(config):
            changes += _allow_to_pass_itself(client("iam"), profile)
    return changes


@contextmanager
def _errors_of_aws() -> Iterator[None]:
    """Errors of AWS as one line. What the launcher prints is dropped, except its last line before an error."""
    import click

    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise UserError(
            "the launcher needs boto3 for AWS", found=str(error), fix="pip install 'ckd-ray[cluster,aws]'"
        ) from None
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            yield
    except (click.ClickException, BotoCoreError, ClientError) as error:
        # The launcher aborts without the reason, which is the error that it was handling.
        refused = next((one for one in _chain(error) if isinstance(one, ClientError)), error)
        message = str(refused).strip() or _COLOUR.sub("", printed.getvalue().strip().rpartition("\n")[2])
        message = " ".join(message.split())
        if _MAY_NOT.search(message):
            raise UserError("AWS does not let you prepare the account", found=message, fix=WITHOUT_IAM) from error
        raise JobError(f"AWS: {message}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def wanted_rules(config: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The permissions of the security group in the launcher's file, as EC2 writes them; None if it has no group."""
    rules: list[dict[str, Any]] | None = (config["provider"].get("security_group") or {}).get("IpPermissions")
    return rules


def rules(permissions: list[dict[str, Any]]) -> Iterator[Rule]:
    """(protocol, first port, last port, addresses) of every range of addresses; rules within the group have none."""
    for one in permissions:
        ports = (one["IpProtocol"], one.get("FromPort", -1), one.get("ToPort", -1))
        for key, address in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6")):
            for addresses in one.get(key) or []:
                yield (*ports, addresses[address])


def _update_group(ec2: Any, group: dict[str, Any], wanted: set[Rule]) -> list[str]:
    have = set(rules(group["IpPermissions"]))
    extra, missing = sorted(have - wanted), sorted(wanted - have)
    if extra:
        ec2.revoke_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[_permission(r) for r in extra])
    if missing:
        ec2.authorize_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[_permission(r) for r in missing])
    name = group["GroupName"]
    closed = [f"security group {name}: closed to {rule[3]} ({port_names(rule)})" for rule in extra]
    return closed + [f"security group {name}: open to {rule[3]} ({port_names(rule)})" for rule in missing]


def _permission(rule: Rule) -> dict[str, Any]:
    protocol, first, last, addresses = rule
    ranges = {"Ipv6Ranges": [{"CidrIpv6": addresses}]} if ":" in addresses else {"IpRanges": [{"CidrIp": addresses}]}
    ports = {} if protocol == "-1" else {"FromPort": first, "ToPort": last}
    return {"IpProtocol": protocol, **ports, **ranges}


def port_names(rule: Rule) -> str:
    """Protocol and ports of a rule for people: `tcp 22`, `tcp 1-9`, or `everything`."""
    protocol, first, last, _ = rule
    if protocol == "-1":
        return "everything"
    return f"{protocol} {first}" if first == last else f"{protocol} {first}-{last}"


def launcher_s_profile(config: dict[str, Any]) -> str | None:
    """The profile, and the role of the same name, that the launcher makes for a head whose type names none."""
    head = config["available_node_types"][config["head_node_type"]].get("node_config") or {}
    if "IamInstanceProfile" in head:
        return None
    return f"{_MADE_BY_RAY}-{'cloudwatch-' if 'cloudwatch' in config['provider'] else ''}v1"


def head_passes_itself(config: dict[str, Any]) -> bool:
    """Whether a type of workers has the launcher's own profile, which the head must then be allowed to pass."""
    name = launcher_s_profile(config)
    return name is not None and any(
        name in (profile.get("Name"), str(profile.get("Arn")).rpartition("/")[2])
        for profile in _workers_with_profile(config)
    )


def _workers_with_profile(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The `IamInstanceProfile` of every type of worker that has one."""
    kinds = [kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]]
    found = [(kind.get("node_config") or {}).get("IamInstanceProfile") for kind in kinds]
    return [profile for profile in found if profile]


def _allow_to_pass_itself(iam: Any, profile: str) -> list[str]:
    """Allow the launcher's role to be passed to machines by its holders. They gain nothing: such a machine may do what
    they may do themselves."""
    from botocore.exceptions import ClientError

    (role,) = iam.get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"]
    name = role["RoleName"]
    if not name.startswith(_MADE_BY_RAY):
        return []
    wanted = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": "iam:PassRole",
                "Resource": role["Arn"],
                "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
            }
        ],
    }
    try:
        if iam.get_role_policy(RoleName=name, PolicyName=PASS_ITSELF)["PolicyDocument"] == wanted:
            return []
    except ClientError as error:  # there is none, or we may not read it: what counts is whether we may write it
        if error.response["Error"]["Code"] not in ("NoSuchEntity", "AccessDenied"):
            raise
    try:
        iam.put_role_policy(RoleName=name, PolicyName=PASS_ITSELF, PolicyDocument=json.dumps(wanted))
    except ClientError as error:
        if error.response["Error"]["Code"] != "AccessDenied":
            raise
        raise UserError(
            "the head could not start workers: its role may not be passed to machines (iam:PassRole), and you may not"
            " change the role",
            where=role["Arn"],
            found=error.response["Error"].get("Message"),
            fix="ask somebody who may change the role to add this inline policy to it, once, under the name"
            f" {PASS_ITSELF}: {json.dumps(wanted)}; or, if the role has the right already, write"
            f" `IamInstanceProfile: {{Name: {profile}}}` in the head's node_config too; or {WITHOUT_IAM}",
        ) from None
    return [f"role {name}: may be passed to workers"]
