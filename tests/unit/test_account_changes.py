"""Before a cluster starts, people read every change to their account, agree to it, or end with `--dry-run`."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckd_ray.checks import load_config
from ckd_ray.errors import UserError
from ckd_ray.jobs import launcher as ray_launcher, remote
from ckd_ray.jobs.aws import PASS_ITSELF, head_passes_itself
from ckd_ray.jobs.changes import account_changes
from ckd_ray.jobs.launcher_file import read_launcher_file
from ckd_ray.jobs.remote import ClusterOptions, Command, run_remote
from ckd_ray.ray_util.target import parse_target

FOLDER = Path(__file__).parents[2] / "cluster"
MINE = "198.18.0.7/32"


@pytest.fixture
def cloud_file(tmp_path: Path) -> Any:
    """Write a copy of a cluster file with its marked values filled in, and more of them changed by the caller."""

    def write(name: str, change: Any = lambda config: None) -> Path:
        config = yaml.safe_load((FOLDER / name).read_text().replace("CHANGE-ME", "mine"))
        if name == "aws.yaml":
            for kind in config["available_node_types"].values():
                kind["node_config"]["ImageId"] = "ami-12c6146b"
            config["provider"]["security_group"]["IpPermissions"][0]["IpRanges"] = [{"CidrIp": MINE}]
        change(config)
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def listed(path: Path) -> dict[str, str]:
    changes = account_changes(read_launcher_file(str(path)), "s3://bucket/runs")
    assert len({change.what for change in changes}) == len(changes)
    return {change.what: change.text for change in changes}


def test_aws_every_change_is_listed_in_the_order_of_the_launcher(cloud_file: Any) -> None:
    found = listed(cloud_file("aws.yaml"))
    assert list(found) == [
        "IAM role", "IAM policy", "key pair", "security group", "EC2 machines", "storage", "token",
    ]  # fmt: skip
    assert found["IAM role"].startswith("ray-autoscaler-v1,") and "AmazonS3FullAccess" in found["IAM role"]
    assert PASS_ITSELF in found["IAM policy"] and "iam:PassRole" in found["IAM policy"]
    assert f"tcp 22 from {MINE}" in found["security group"] and "REMOVED" in found["security group"]
    assert found["EC2 machines"].startswith("1 x m6i.2xlarge, 2 x g5.12xlarge (spot), with their disks")
    assert "no bucket is made or changed" in found["storage"] and "s3://bucket/runs" in found["storage"]


def test_aws_what_the_file_names_is_not_made(cloud_file: Any) -> None:
    def own(config: dict[str, Any]) -> None:
        config["auth"]["ssh_private_key"] = "~/.ssh/mine.pem"
        for kind in config["available_node_types"].values():
            kind["node_config"] |= {"IamInstanceProfile": {"Name": "ckd-ray"}, "SecurityGroupIds": ["sg-1"]}

    assert list(listed(cloud_file("aws.yaml", own))) == ["EC2 machines", "storage", "token"]

    def open_to_all(config: dict[str, Any]) -> None:
        del config["provider"]["security_group"]["IpPermissions"]
        del config["available_node_types"]["gpu"]["node_config"]["IamInstanceProfile"]

    found = listed(cloud_file("aws.yaml", open_to_all))
    assert "IAM policy" not in found and "SSH from the whole internet" in found["security group"]


def test_the_policy_is_written_for_workers_that_have_the_launcher_s_profile_alone() -> None:
    def config(head: dict[str, Any], worker: dict[str, Any]) -> dict[str, Any]:
        kinds = {"head": {"node_config": head}, "gpu": {"node_config": worker}}
        return {"provider": {"type": "aws"}, "head_node_type": "head", "available_node_types": kinds}

    by_name, by_arn = {"Name": "ray-autoscaler-v1"}, {"Arn": "arn:aws:iam::1:instance-profile/ray-autoscaler-v1"}
    assert head_passes_itself(config({}, {"IamInstanceProfile": by_name}))
    assert head_passes_itself(config({}, {"IamInstanceProfile": by_arn}))
    assert not head_passes_itself(config({}, {"IamInstanceProfile": {"Name": "other"}}))
    assert not head_passes_itself(config({"IamInstanceProfile": by_name}, {"IamInstanceProfile": by_name}))
    assert not head_passes_itself(config({}, {}))


def test_gcp_and_own_machines(cloud_file: Any) -> None:
    found = listed(cloud_file("gcp.yaml"))
    assert list(found) == [
        "project", "service account", "IAM policy", "SSH key", "firewall", "machines", "storage", "token",
    ]  # fmt: skip
    assert "compute.admin" in found["IAM policy"] and "metadata of the project" in found["SSH key"]
    assert "ray-autoscaler-sa-v1@mine" in found["service account"]
    own = listed(cloud_file("local.yaml"))
    assert list(own) == ["machines", "storage", "token"]
    assert "192.168.1.10, 192.168.1.11, as ubuntu" in own["machines"] and "ends" in own["machines"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of Ray's launcher and of the account. The cluster is not up."""
    calls: list[str] = []
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")
    for name in ("use_launcher_s_token", "head_address", "bring_up", "take_down"):
        monkeypatch.setattr(ray_launcher, name, lambda *_, name=name: calls.append(name))
    monkeypatch.setattr(remote, "prepare_account", lambda _: calls.append("prepare_account") or [])
    return calls


def train(path: Path, options: ClusterOptions, *words: str) -> tuple[int, str]:
    target, out = parse_target(str(path)), io.StringIO()
    assert target is not None
    config = load_config(None, ["run.storage=s3://bucket/runs"])
    return run_remote(target, Command("train", [*words], {}, config), options, out), out.getvalue()


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "local.yaml"])
def test_a_dry_run_lists_and_does_nothing(
    name: str, cloud_file: Any, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = cloud_file(name)
    status, printed = train(path, ClusterOptions(dry_run=True), "--json")
    assert status == 0 and asked == []
    told = capsys.readouterr().err
    for change in json.loads(printed)["changes"]:
        assert re.search(rf"{re.escape(change['what'])} +{re.escape(change['text'])}", told)
    assert json.loads(printed)["cluster"] == str(path) and "STILL UP" not in told


def test_no_leaves_the_account_as_it_is_and_the_list_is_shown_even_when_quiet(
    cloud_file: Any, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = []
    monkeypatch.setattr("ckd_ray.progress._quiet", True)
    monkeypatch.setattr(remote, "confirmed", lambda question, yes: questions.append((question, yes)))
    with pytest.raises(UserError, match="nothing was started or changed"):
        train(cloud_file("aws.yaml"), ClusterOptions())
    assert questions == [("make these changes and start this cluster?", False)]
    assert asked == ["use_launcher_s_token", "head_address"] and PASS_ITSELF in capsys.readouterr().err


def test_the_policy_for_who_may_not_write_iam() -> None:
    """It allows what the launcher asks for, ends machines of our cluster alone, and hands over no other role."""
    policy = json.loads((FOLDER / "aws-policy.json").read_text())
    config = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    statements = {one["Sid"]: one for one in policy["Statement"]}
    allowed = {a for s in statements.values() for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])}
    assert not any(action.endswith(":*") for action in allowed) and {a for a in allowed if a.startswith("iam:")} == {
        "iam:PassRole"
    }
    tag = statements["EndMachinesOfThisClusterAlone"]["Condition"]["StringEquals"]
    assert tag == {"aws:ResourceTag/ray-cluster-name": config["cluster_name"]}
    assert statements["HandThisRoleToMachines"]["Resource"].endswith(":role/ckd-ray")
    changed = copy.deepcopy(config)
    for kind in changed["available_node_types"].values():
        kind["node_config"]["IamInstanceProfile"] = {"Name": "ckd-ray"}
    assert head_passes_itself(config) and not head_passes_itself(changed), "no IAM is written with a role of one's own"
    trust = json.loads((FOLDER / "aws-trust.json").read_text())["Statement"]
    assert [one["Principal"] for one in trust] == [{"Service": "ec2.amazonaws.com"}]
