"""cluster/aws.yaml through Ray's real launcher, against a moto server: what is made, how open it is, and what is left.

No machine answers there, so the launcher is given seconds to wait for SSH and its failure to reach one is expected.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckd_ray.errors import UserError
from ckd_ray.jobs.aws import prepare_account
from ckd_ray.jobs.launcher_file import read_launcher_file

boto3 = pytest.importorskip("boto3")
pytest.importorskip("moto.server")
pytest.importorskip("ray.autoscaler.sdk")
pytestmark = pytest.mark.soak  # the launcher waits 15 s for a new profile, twice, and moto lists every type of machine
ROOT = Path(__file__).parents[2]
MINE = "198.18.0.7/32"
IMAGE = "ami-12c6146b"  # moto knows it

# As `ckd-ray train --cluster` starts and ends a cluster. The worker is started as the autoscaler on the head does it.
LAUNCH = """
import sys, yaml
from click import ClickException
from ray.autoscaler.sdk import bootstrap_config, create_or_update_cluster
from ray.autoscaler._private.providers import _get_node_provider
from ckd_ray.jobs.aws import prepare_account
from ckd_ray.jobs.placeholders import check_launcher_filled_in
config = yaml.safe_load(open(sys.argv[1]))
check_launcher_filled_in(config, sys.argv[1])
print("\\n".join(prepare_account(config)), flush=True)
try:
    create_or_update_cluster(config, no_restart=True, no_config_cache=True)
except (ClickException, SystemExit) as error:
    print("no head answers:", error, flush=True)
full = bootstrap_config(config, no_config_cache=True)
provider = _get_node_provider(full["provider"], full["cluster_name"])
tags = {"ray-node-type": "worker", "ray-user-node-type": "gpu", "ray-node-status": "uninitialized"}
provider.create_node(full["available_node_types"]["gpu"]["node_config"], tags, 1)
"""
CLOSE = """
import sys, yaml
from ray.autoscaler._private.util import prepare_config
from ckd_ray.jobs.aws import prepare_account
print("\\n".join(prepare_account(prepare_config(yaml.safe_load(open(sys.argv[1]))))))
"""
DOWN = """
import sys, yaml
from ray.autoscaler.sdk import teardown_cluster
teardown_cluster(yaml.safe_load(open(sys.argv[1])))
"""


class Account:
    """A moto server of our own, and a home directory: the launcher writes keys."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_AUTH"))},
            "HOME": str(folder),
            "RAY_TMPDIR": str(folder / "tmp"),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AUTOSCALER_NODE_START_WAIT_S": "3",
            "PYTHONUNBUFFERED": "1",
        }
        (folder / "tmp").mkdir()
        token = folder / ".ray" / "auth_token"
        token.parent.mkdir(mode=0o700)
        token.write_text("0" * 64)
        self.port = port

    def client(self, service: str) -> Any:
        """A boto3 client of this account."""
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        return boto3.client(service, endpoint_url=f"http://127.0.0.1:{self.port}", **keys)

    def run(self, code: str, file: Path) -> str:
        """A script of the above on a launcher's file, in the root of the repository."""
        done = subprocess.run(
            [sys.executable, "-c", code, str(file)],
            capture_output=True, text=True, timeout=600, env=self.environment, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    def instances(self, *states: str) -> dict[str, dict[str, Any]]:
        """Machines by their type of node."""
        found = [i for r in self.client("ec2").describe_instances()["Reservations"] for i in r["Instances"]]
        named = [({t["Key"]: t["Value"] for t in i["Tags"]}, i) for i in found if i["State"]["Name"] in states]
        return {tags["ray-user-node-type"]: instance for tags, instance in named}

    def rules(self) -> set[tuple[str, int | None, str]]:
        """(protocol, port, who may connect) of the cluster's group."""
        (group,) = self.client("ec2").describe_security_groups(
            Filters=[{"Name": "group-name", "Values": ["ckd-ray-closed"]}]
        )["SecurityGroups"]
        found = set()
        for one in group["IpPermissions"]:
            who = [r["CidrIp"] for r in one["IpRanges"]]
            who += ["itself" if p["GroupId"] == group["GroupId"] else p["GroupId"] for p in one["UserIdGroupPairs"]]
            found |= {(one["IpProtocol"], one.get("FromPort") if one["IpProtocol"] == "tcp" else None, w) for w in who}
        return found


@pytest.fixture
def account(tmp_path: Path) -> Iterator[Account]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not _answers(port):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield Account(tmp_path, port)
    finally:
        server.kill()
        server.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def aws_file(folder: Path, change: Callable[[dict[str, Any]], None] = lambda config: None) -> Path:
    """cluster/aws.yaml with its marked values filled in."""
    config = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    for kind in config["available_node_types"].values():
        kind["node_config"]["ImageId"] = IMAGE
    config["provider"]["security_group"]["IpPermissions"][0]["IpRanges"] = [{"CidrIp": MINE}]
    change(config)
    path = folder / "aws.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_the_launcher_makes_what_the_file_says_and_down_leaves_nothing(account: Account) -> None:
    file = aws_file(account.folder)
    told = account.run(LAUNCH, file)
    assert "security group ckd-ray-closed: closed to 0.0.0.0/0 (tcp 22)" in told and "no head answers" in told

    running = account.instances("running", "pending")
    assert {name: (i["InstanceType"], i.get("InstanceLifecycle")) for name, i in running.items()} == {
        "head": ("m6i.2xlarge", None),
        "gpu": ("g5.12xlarge", "spot"),
    }
    ec2, iam = account.client("ec2"), account.client("iam")
    profile = iam.get_instance_profile(InstanceProfileName="ray-autoscaler-v1")["InstanceProfile"]
    assert all(i["IamInstanceProfile"]["Arn"] == profile["Arn"] for i in running.values())
    policies = iam.list_attached_role_policies(RoleName=profile["Roles"][0]["RoleName"])["AttachedPolicies"]
    assert {p["PolicyName"] for p in policies} == {"AmazonEC2FullAccess", "AmazonS3FullAccess"}
    own = iam.list_role_policies(RoleName=profile["Roles"][0]["RoleName"])["PolicyNames"]
    assert own == ["ckd-ray-pass-itself"], "without it AWS refuses the head's request for workers"
    keys = {k["KeyName"] for k in ec2.describe_key_pairs()["KeyPairs"]}
    assert {i["KeyName"] for i in running.values()} == keys and len(keys) == 1
    (pem,) = (account.folder / ".ssh").glob("*.pem")
    assert pem.stat().st_mode & 0o777 == 0o600

    assert account.rules() == {("-1", None, "itself"), ("tcp", 22, MINE)}
    assert all([g["GroupName"] for g in i["SecurityGroups"]] == ["ckd-ray-closed"] for i in running.values())
    disks = {}
    for name, instance in running.items():
        ids = [d["Ebs"]["VolumeId"] for d in instance["BlockDeviceMappings"]]
        (disk,) = ec2.describe_volumes(VolumeIds=ids)["Volumes"]
        disks[name] = (disk["Size"], disk["VolumeType"], disk["Encrypted"])
    assert disks == {"head": (150, "gp3", True), "gpu": (200, "gp3", True)}

    account.run(DOWN, file)
    assert account.instances("running", "pending", "stopped", "stopping") == {}
    assert set(account.instances("terminated", "shutting-down")) == {"head", "gpu"}
    left = [v for v in ec2.describe_volumes()["Volumes"] if v["State"] != "deleted"]
    assert left == [], json.dumps(left, default=str)


def test_a_changed_address_moves_the_door_and_foreign_groups_are_left_alone(account: Account) -> None:
    account.client("iam").create_instance_profile(InstanceProfileName="mine")  # the launcher would wait for a new one

    def mine(config: dict[str, Any]) -> None:
        config["available_node_types"]["head"]["node_config"]["IamInstanceProfile"] = {"Name": "mine"}

    account.run(CLOSE, aws_file(account.folder, mine))
    assert account.rules() == {("-1", None, "itself"), ("tcp", 22, MINE)}

    def moved(config: dict[str, Any]) -> None:
        mine(config)
        config["provider"]["security_group"]["IpPermissions"][0]["IpRanges"] = [{"CidrIp": "198.18.1.0/24"}]

    told = account.run(CLOSE, aws_file(account.folder, moved))
    assert account.rules() == {("-1", None, "itself"), ("tcp", 22, "198.18.1.0/24")}
    assert f"closed to {MINE}" in told and "open to 198.18.1.0/24" in told
    told = account.run(CLOSE, aws_file(account.folder, moved))
    assert "open to" not in told and "closed to" not in told, "what is as it should be is left alone"

    ec2 = account.client("ec2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    foreign = ec2.create_security_group(GroupName="theirs", Description="made by hand", VpcId=vpc)["GroupId"]
    everyone = [{"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
    ec2.authorize_security_group_ingress(GroupId=foreign, IpPermissions=everyone)

    def by_hand(config: dict[str, Any]) -> None:
        mine(config)
        config["provider"]["security_group"]["GroupName"] = "theirs"

    told = account.run(CLOSE, aws_file(account.folder, by_hand))
    assert "open to" not in told and "closed to" not in told
    (group,) = ec2.describe_security_groups(GroupIds=[foreign])["SecurityGroups"]
    assert group["IpPermissions"][0]["IpRanges"][0]["CidrIp"] == "0.0.0.0/0"


@pytest.mark.parametrize("taken", [None, "ec2:RunInstances", "ec2:AuthorizeSecurityGroupIngress"])
def test_the_documented_policy_is_enough_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str | None
) -> None:
    """With a role of one's own and cluster/aws-policy.json, a user without a right to IAM starts and ends machines."""
    from moto import mock_aws
    from moto.core import set_initial_no_auth_action_count
    from ray.autoscaler._private.aws import utils
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.node_launch_exception import NodeLaunchException
    from ray.autoscaler.sdk import bootstrap_config

    def own_role(config: dict[str, Any]) -> None:
        for kind in config["available_node_types"].values():
            kind["node_config"]["IamInstanceProfile"] = {"Name": "ckd-ray"}

    def keys(user: dict[str, str]) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", user["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", user["SecretAccessKey"])
        boto3.setup_default_session()
        for cached in (utils.resource_cache, utils.client_cache):
            cached.cache_clear()

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    prepared = read_launcher_file(str(aws_file(tmp_path, own_role))).prepared
    policy = (ROOT / "cluster" / "aws-policy.json").read_text().replace("CHANGE-ME-ACCOUNT", "123456789012")

    @set_initial_no_auth_action_count(0)  # type: ignore[untyped-decorator]
    def as_the_user() -> None:
        prepare_account(prepared)
        full = bootstrap_config(prepared, no_config_cache=True)
        provider = _get_node_provider(full["provider"], full["cluster_name"], use_cache=False)
        tags = {"ray-node-type": "worker", "ray-user-node-type": "gpu", "ray-node-status": "uninitialized"}
        provider.create_node(full["available_node_types"]["gpu"]["node_config"], tags, 1)
        (node,) = provider.non_terminated_nodes({})
        provider.terminate_nodes([node])
        assert provider.non_terminated_nodes({}) == []

    with mock_aws():
        keys({"AccessKeyId": "testing", "SecretAccessKey": "testing"})
        iam = boto3.client("iam")
        iam.create_user(UserName="somebody")
        document = policy.replace(taken, "ec2:Nothing") if taken else policy
        iam.put_user_policy(UserName="somebody", PolicyName="ckd-ray", PolicyDocument=document)
        trust = (ROOT / "cluster" / "aws-trust.json").read_text()
        iam.create_role(RoleName="ckd-ray", AssumeRolePolicyDocument=trust)
        iam.create_instance_profile(InstanceProfileName="ckd-ray")
        iam.add_role_to_instance_profile(InstanceProfileName="ckd-ray", RoleName="ckd-ray")
        keys(iam.create_access_key(UserName="somebody")["AccessKey"])
        if taken is None:
            as_the_user()
            with pytest.raises(UserError, match=r"(?s)does not let you prepare the account.*aws-policy.json"):
                set_initial_no_auth_action_count(0)(lambda: prepare_account(without_own_role(tmp_path)))()
        else:
            with pytest.raises((UserError, NodeLaunchException), match=r"not authorized|AccessDenied"):
                as_the_user()


def without_own_role(folder: Path) -> dict[str, Any]:
    """The file as it is shipped, so that the launcher makes a role."""
    return read_launcher_file(str(aws_file(folder))).prepared
