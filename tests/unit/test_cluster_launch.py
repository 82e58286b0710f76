"""Before a cluster starts: what is refused without a word about costs, and what is put right in the account."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckd_ray.checks import load_config
from ckd_ray.errors import JobError, UserError
from ckd_ray.jobs import launcher as ray_launcher
from ckd_ray.jobs.aws import prepare_account
from ckd_ray.jobs.home import bring_home
from ckd_ray.jobs.launcher_file import read_launcher_file
from ckd_ray.jobs.placeholders import check_config_filled_in, check_launcher_filled_in
from ckd_ray.jobs.remote import ClusterOptions, Command, run_remote
from ckd_ray.ray_util.target import parse_target

ROOT = Path(__file__).parents[2]
PROFILE = "ray-autoscaler-v1"


def cloud_file(name: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / name).read_text())
    return value


@pytest.fixture
def iam(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An account in which the launcher has made its role and profile, as Ray's `_configure_iam_role` does."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with moto.mock_aws():
        client = boto3.client("iam", region_name="us-east-1")
        client.create_role(RoleName=PROFILE, AssumeRolePolicyDocument="{}")
        profile = client.create_instance_profile(InstanceProfileName=PROFILE)["InstanceProfile"]
        client.add_role_to_instance_profile(InstanceProfileName=PROFILE, RoleName=PROFILE)

        def bootstrap_config(config: dict[str, Any], **_: Any) -> dict[str, Any]:
            head = config["available_node_types"]["head"]["node_config"]
            chosen = {} if "IamInstanceProfile" in head else {"IamInstanceProfile": {"Arn": profile["Arn"]}}
            return {**config, "head_node": chosen}

        monkeypatch.setattr("ray.autoscaler.sdk.bootstrap_config", bootstrap_config)
        yield client


def without_rules() -> dict[str, Any]:
    config = cloud_file("aws.yaml")
    del config["provider"]["security_group"]  # of no matter here
    return config


def test_the_head_may_hand_its_own_role_to_workers_and_no_other(iam: Any) -> None:
    told = prepare_account(without_rules())
    (name,) = iam.list_role_policies(RoleName=PROFILE)["PolicyNames"]
    (statement,) = iam.get_role_policy(RoleName=PROFILE, PolicyName=name)["PolicyDocument"]["Statement"]
    assert statement == {
        "Effect": "Allow",
        "Action": "iam:PassRole",
        "Resource": iam.get_role(RoleName=PROFILE)["Role"]["Arn"],
        "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
    }
    assert told == [f"role {PROFILE}: may be passed to workers"]
    assert prepare_account(without_rules()) == [], "what is as it should be is left alone"


def test_roles_of_the_user_s_own_are_left_alone(iam: Any) -> None:
    own = without_rules()
    own["available_node_types"]["head"]["node_config"]["IamInstanceProfile"] = {"Name": "mine"}
    plain = without_rules()
    del plain["available_node_types"]["gpu"]["node_config"]["IamInstanceProfile"]
    assert prepare_account(own) == prepare_account(plain) == []
    assert iam.list_role_policies(RoleName=PROFILE)["PolicyNames"] == []


def test_who_may_not_change_the_role_is_told_what_to_ask_for(iam: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.client import BaseClient
    from botocore.exceptions import ClientError

    real = BaseClient._make_api_call

    def refuse(self: Any, operation: str, values: Any) -> Any:
        if operation in ("GetRolePolicy", "PutRolePolicy"):
            raise ClientError({"Error": {"Code": "AccessDenied", "Message": "not authorized"}}, operation)
        return real(self, operation, values)

    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    with pytest.raises(UserError, match=f"role/{PROFILE}: the head could not start workers") as raised:
        prepare_account(without_rules())
    fix = str(raised.value.fix)
    policy = json.loads(fix[fix.index("{") : fix.index("; or")])
    assert policy["Statement"][0]["Action"] == "iam:PassRole" and raised.value.found == "not authorized"


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("aws.yaml", ["head.node_config.ImageId", "gpu.node_config.ImageId", "provider.security_group.IpPermissions"]),
        ("gcp.yaml", ["provider.project_id", "gpu.node_config.serviceAccounts[0].email"]),
    ],
)
def test_every_value_to_be_filled_in_is_named(name: str, keys: list[str]) -> None:
    with pytest.raises(UserError, match=name) as raised:
        check_launcher_filled_in(cloud_file(name), name)
    assert [key in str(raised.value.found) for key in keys] == [True] * len(keys), raised.value.found
    check_launcher_filled_in(cloud_file("local.yaml"), "local.yaml")


def test_a_configuration_to_be_filled_in_is_refused() -> None:
    recipe = str(ROOT / "configs" / "msmarco.yaml")
    with pytest.raises(UserError, match=r"run\.storage: still to be filled in"):
        check_config_filled_in(load_config(recipe))
    check_config_filled_in(load_config(recipe, ["run.storage=s3://mine/ckd-ray"]))


class Launcher:
    """In the place of Ray's: a cluster that is not up, and a list of what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        for name in ("use_launcher_s_token", "head_address", "bring_up", "take_down"):
            monkeypatch.setattr(ray_launcher, name, lambda *_, name=name: self.asked.append(name))


def train_on(file: Path, *overrides: str) -> int:
    target = parse_target(str(file))
    assert target is not None
    config = load_config(None, ["run.storage=s3://bucket/runs", *overrides])
    return run_remote(target, Command("train", [], {}, config), ClusterOptions(yes=True, down=True), io.StringIO())


@pytest.mark.parametrize(
    ("name", "overrides", "path", "message"),
    [
        ("aws.yaml", [], None, "values of this file are still to be filled in"),
        ("gcp.yaml", [], None, r"provider\.project_id"),
        ("local.yaml", ["run.storage=s3://CHANGE-ME/x"], None, r"run\.storage: still to be filled in"),
        ("local.yaml", [], "", "needs ssh and rsync"),
    ],
)
def test_what_is_not_ready_starts_nothing_and_says_nothing_of_a_cluster(
    name: str,
    overrides: list[str],
    path: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launcher = Launcher(monkeypatch)
    if path is None:
        monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")
    else:
        monkeypatch.setenv("PATH", path)
    with pytest.raises(UserError, match=message):
        train_on(ROOT / "cluster" / name, *overrides)
    assert launcher.asked == [] and "cluster" not in capsys.readouterr().err.lower()


def test_an_account_that_cannot_be_prepared_leaves_no_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(_: Any) -> list[str]:
        raise JobError("AWS: no")

    launcher = Launcher(monkeypatch)
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr("ckd_ray.jobs.remote.prepare_account", refused)
    with pytest.raises(JobError, match="AWS: no"):
        train_on(ROOT / "cluster" / "local.yaml")
    assert launcher.asked == ["use_launcher_s_token", "head_address"]
    assert "STILL UP" not in capsys.readouterr().err


def test_results_that_were_not_made_cost_a_line_and_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import click

    def rsync(_: str, source: str, target: str, down: bool) -> None:
        if not source.endswith("run.json"):
            print("rsync: change_dir failed: No such file or directory (2)\n" * 30)
            raise click.ClickException("Command failed")
        Path(target).touch()

    monkeypatch.setattr("ray.autoscaler.sdk.rsync", rsync)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    launcher = read_launcher_file(str(ROOT / "cluster" / "local.yaml"))
    monkeypatch.chdir(tmp_path)
    assert bring_home(launcher, "train", "runs/r") == Path("runs/r")
    told = capsys.readouterr().err.splitlines()
    assert told[1] == "fetched run.json -> runs/r"
    assert told[2].startswith("missing or out of reach: evaluation/, student/ (log: ") and len(told) == 3


def test_down_tells_programs_and_can_be_quiet(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from ckd_ray.cli.clusters import down

    monkeypatch.setattr("ckd_ray.progress._quiet", False)  # put back afterwards
    launcher, file = Launcher(monkeypatch), str(ROOT / "cluster" / "local.yaml")
    down(target=file, yes=True, json_=True, quiet=True)
    out, err = capfd.readouterr()
    assert launcher.asked == ["use_launcher_s_token", "take_down"]
    assert json.loads(out) == {"target": file, "up": False} and err == ""
