"""What `--cluster` means before anything is started: targets, launcher files, prices, what travels, what is refused."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckd_ray.checks import load_config
from ckd_ray.config import Config
from ckd_ray.errors import UserError
from ckd_ray.jobs import nodes
from ckd_ray.jobs.bundle import CONFIG_NAME, check_for_job, holds_secret, input_paths, write_bundle
from ckd_ray.jobs.confirm import confirmed
from ckd_ray.jobs.follow import Printer
from ckd_ray.jobs.home import local_folder
from ckd_ray.jobs.launcher_file import cost_per_hour, describe, read_launcher_file, warnings
from ckd_ray.jobs.nodes import look_at
from ckd_ray.jobs.prices import hourly
from ckd_ray.jobs.remote import ClusterOptions
from ckd_ray.jobs.submit import BEGIN, MARK, JobRequest
from ckd_ray.jobs.tunnel import Tunnel
from ckd_ray.ray_util.target import parse_target
from ckd_ray.ray_util.token import ensure_token

LOCAL = Path(__file__).parents[2] / "cluster" / "local.yaml"


def aws(folder: Path, **changes: Any) -> str:
    """A launcher's file for a head and one to four spot machines."""
    start = "RAY_AUTH_MODE=token ray start"
    values: dict[str, Any] = {
        "cluster_name": "c",
        "max_workers": 3,
        "provider": {"type": "aws", "region": "us-east-1", "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "available_node_types": {
            "head": {"resources": {}, "node_config": {"InstanceType": "m5.xlarge", "ImageId": "ami-1"}},
            "gpu": {
                "min_workers": 1,
                "max_workers": 4,
                "resources": {},
                "node_config": {
                    "InstanceType": "g5.xlarge",
                    "ImageId": "ami-1",
                    "InstanceMarketOptions": {"MarketType": "spot"},
                },
            },
        },
        "head_node_type": "head",
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
        "head_start_ray_commands": [f"{start} --head --dashboard-host=127.0.0.1"],
        "worker_start_ray_commands": [f"{start} --address=$RAY_HEAD_IP:6379"],
    }
    values |= changes
    path = folder / "aws.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return str(path)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("local", "local"),
        ("127.0.0.1:6379", "address"),
        ("[::1]:6379", "address"),
        ("auto", "address"),
        ("ray://head:10001", "address"),
        ("http://head:8265/", "dashboard"),
        ("https://head", "dashboard"),
        (str(LOCAL), "launcher"),
    ],
)
def test_targets(text: str, kind: str) -> None:
    target = parse_target(text)
    assert target is not None and target.kind == kind
    assert target.remote == (kind in ("dashboard", "launcher"))


@pytest.mark.parametrize(
    "text", ["nowhere.yaml", "head", "ftp://head:1", "http://", "http://u:p@head:1", "http://head:1/api", "http://h:x"]
)
def test_targets_that_name_nothing(text: str) -> None:
    with pytest.raises(UserError, match="--cluster"):
        parse_target(text)


def test_a_token_travels_in_clear_over_http_only() -> None:
    told = {t: parse_target(t).in_clear for t in ("http://127.0.0.1:1", "http://head:1", "https://head:1")}  # type: ignore[union-attr]
    assert list(told.values()) == [False, True, False]


def test_options_that_contradict() -> None:
    launcher, dashboard = parse_target(str(LOCAL)), parse_target("http://h:1")
    ClusterOptions(down=True).check(launcher)
    ClusterOptions(detach=True).check(dashboard)
    for options, target in (
        (ClusterOptions(down=True, keep=True), launcher),
        (ClusterOptions(down=True, detach=True), launcher),
        (ClusterOptions(down=True), dashboard),
        (ClusterOptions(keep=True), None),
        (ClusterOptions(detach=True), parse_target("local")),
        (ClusterOptions(dry_run=True), dashboard),
        (ClusterOptions(dry_run=True), None),
    ):
        with pytest.raises(UserError):
            options.check(target)


PRICES = """
m5.xlarge: 0.2
g5.xlarge: [1.0, 0.4]
n1-standard-8: [0.4, 0.1]
nvidia-tesla-t4: [0.3, 0.1]
"""


def test_what_a_file_would_start_and_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prices.yaml").write_text(PRICES)
    monkeypatch.setenv("CKD_RAY_PRICES", str(tmp_path / "prices.yaml"))
    launcher = read_launcher_file(aws(tmp_path))
    assert (launcher.least_nodes, launcher.most_nodes) == (2, 4)
    assert launcher.token_source == Path.home() / ".ray" / "auth_token"
    # A head at 0.2 on demand, and one to three spot machines at 0.4.
    assert cost_per_hour(launcher) == pytest.approx((0.6, 1.4))
    text = "\n".join(describe(launcher))
    assert "1 x m5.xlarge, on demand" in text and "1 to 3 x g5.xlarge, spot" in text
    assert "about 0.60 to 1.40 USD an hour by your prices" in text
    local = describe(read_launcher_file(str(LOCAL)))
    assert "192.168.1.10" in local[1] and "192.168.1.11" in local[2] and not any("USD" in line for line in local)


def test_unknown_prices_and_prices_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKD_RAY_PRICES", raising=False)
    launcher = read_launcher_file(aws(tmp_path))
    assert hourly("m5.xlarge", spot=False) is None and cost_per_hour(launcher) == (None, None)
    told = "\n".join(describe(launcher))
    assert "price unknown" in told and "CKD_RAY_PRICES=FILE.yaml" in told
    (tmp_path / "prices.yaml").write_text(PRICES)
    monkeypatch.setenv("CKD_RAY_PRICES", str(tmp_path / "prices.yaml"))
    assert cost_per_hour(launcher) == pytest.approx((0.6, 1.4))
    assert hourly("n1-standard-8", spot=False, accelerators={"nvidia-tesla-t4": 2}) == pytest.approx(1.0)
    assert hourly("n1-standard-8", spot=True, accelerators={"nvidia-l4": 1}) is None
    (tmp_path / "other.yaml").write_text("m5.xlarge: 7\n")
    assert hourly("m5.xlarge", spot=True, file=str(tmp_path / "other.yaml")) == 7
    for text in ("z9.huge: ten", "z9.huge: -1", "z9.huge: [1]", "[1, 2]"):
        (tmp_path / "prices.yaml").write_text(text)
        with pytest.raises(UserError, match="CKD_RAY_PRICES"):
            hourly("z9.huge", spot=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_worker": 3}, "did you mean max_workers?"),
        ({"max_workers": "many"}, "max_workers: 'many' is not of type 'integer'"),
        ({"auth": {"ssh_user": "u", "ssh_private_ky": "k"}}, "auth: .*did you mean ssh_private_key?"),
        ({"head_start_ray_commands": ["RAY_AUTH_MODE=token ray start --head --dashboard-host 0.0.0.0"]}, "0.0.0.0"),
        ({"head_start_ray_commands": ["RAY_AUTH_MODE=token ray start --head --dashboard-host='::'"]}, "opens the dash"),
        ({"head_start_ray_commands": None}, "head_start_ray_commands: --dashboard-host 0.0.0.0"),  # Ray's own default
        ({"worker_start_ray_commands": ["ray start"]}, "worker_start_ray_commands: .*without asking for a token"),
        ({"file_mounts": {}}, "file_mounts: no token reaches the machines"),
        ({"provider": {"region": "r"}}, "provider.type"),
        ({"provider": None}, "not a cluster launcher's file"),
        ({"available_node_types": {}}, "aws.yaml"),
    ],
)
def test_files_that_are_refused_name_the_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = aws(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as raised:
        read_launcher_file(path)
    assert path in str(raised.value)
    if "start" in str(changes) or "file_mounts" in changes:  # a cluster that runs so can still be looked at and ended
        assert read_launcher_file(path, strict=False).provider == "aws"


def test_warnings(tmp_path: Path) -> None:
    provider = {"type": "aws", "region": "us-east-1", "cache_stopped_nodes": False}
    rules = [{"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
    closed = [{**rules[0], "IpRanges": [{"CidrIp": "203.0.113.0/24"}]}]
    told = [
        warnings(read_launcher_file(aws(tmp_path, provider=provider | change)))
        for change in (
            {"security_group": {"IpPermissions": closed}},
            {"security_group": {"IpPermissions": rules}},
            {},
            {"security_group": {"IpPermissions": closed}, "cache_stopped_nodes": True},
        )
    ]
    assert [len(found) for found in told] == [0, 1, 1, 1]
    assert "whole internet" in told[1][0] and "SSH is open" in told[2][0] and "disks still cost" in told[3][0]


def config(*overrides: str) -> Config:
    return load_config(None, overrides)


@pytest.mark.parametrize(
    ("uri", "secret"),
    [
        ("s3://bucket/folder", False),
        ("s3://key:secret@bucket/folder", True),
        ("s3://key@bucket/folder", True),
        ("s3://bucket/f?scheme=http&endpoint_override=host:9000", False),
        ("s3://bucket/f?secret_key=abc", True),
        ("abfs://container@account.dfs.core.windows.net/f", False),
        ("abfs://:password@account/f", True),
        ("https://host/f?X-Amz-Signature=abc", True),
        ("runs", False),
        ("a@b:c", False),
    ],
)
def test_secrets_in_uris(uri: str, secret: bool) -> None:
    assert holds_secret(uri) == secret


def test_what_cannot_work_elsewhere_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rented, own = read_launcher_file(aws(tmp_path)), read_launcher_file(str(LOCAL))
    alone = read_launcher_file(aws(tmp_path, max_workers=0, available_node_types=None, head_node_type=None))
    s3 = "run.storage=s3://bucket/runs"
    for launcher in (None, rented, own):
        check_for_job(config(s3), {"suggest": "s3://bucket/x"}, launcher)
        for overrides, arguments, where in (
            (["run.storage=s3://k:topsecret@bucket/runs"], {}, "run.storage"),
            ([s3, "collection.format=msmarco", "collection.path=data"], {}, "collection.path"),
            ([s3, "collection.format=msmarco", "collection.path=s3://k:topsecret@b/d"], {}, "collection.path"),
            ([s3], {"suggest": "s3://k:topsecret@b/x"}, "suggest"),
        ):
            with pytest.raises(UserError, match=where) as raised:
                check_for_job(config(*overrides), arguments, launcher)
            assert "topsecret" not in str(raised.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"model\.backbone") as raised:
        check_for_job(config(s3, "model.backbone=model"), {}, own)
    assert "URI" not in str(raised.value), "no library loads a model from one"
    check_for_job(config(s3, "model.backbone=org/model"), {}, own)  # a hub id
    with pytest.raises(UserError, match=r"run\.storage"):
        check_for_job(config(), {}, rented)
    check_for_job(config("run.storage=/mnt/shared"), {}, rented)
    for launcher in (None, own, alone):
        check_for_job(config(), {}, launcher)


def test_files_of_options_that_the_head_cannot_reach_are_refused(tmp_path: Path) -> None:
    rented, own = read_launcher_file(aws(tmp_path)), read_launcher_file(str(LOCAL))
    s3, shared, heads = (config(f"run.storage={storage}") for storage in ("s3://b/runs", "/mnt/runs", "runs"))
    for given, option, value, launcher in (
        (s3, "suggest", "out.tsv", None),
        (s3, "suggest", "out.tsv", own),
        (heads, "suggest", "out.tsv", own),
        (s3, "suggest", "/home/me/out.tsv", rented),
        (s3, "against", "other", None),
        (shared, "against", "runs/other", own),
        (s3, "against", "/home/me/runs/other", rented),
    ):
        with pytest.raises(UserError, match=f"^--{option}: the head of the cluster would"):
            check_for_job(given, {option: value}, launcher)
    for given, option, value, launcher in (
        (s3, "suggest", "s3://b/out.tsv", rented),
        (shared, "suggest", "/mnt/out.tsv", rented),
        (s3, "suggest", "/mnt/out.tsv", own),
        (heads, "against", "other", own),  # both are below ~/ckd-ray of the head
        (s3, "against", "s3://b/runs/other", rented),
    ):
        check_for_job(given, {option: value}, launcher)


def test_input_paths() -> None:
    given = config(
        "collection.format=msmarco", "collection.passages=/d/p", "collection.queries={train: /d/q}",
        "collection.qrels={train: /d/r}", "model.backbone=/m", "teacher.checkpoint=org/t", "cross_encoder.scores=/s",
    )  # fmt: skip
    assert dict(input_paths(given)) == {
        "collection.passages": "/d/p",
        "collection.queries.train": "/d/q",
        "collection.qrels.train": "/d/r",
        "cross_encoder.scores": "/s",
        "model.backbone": "/m",
    }
    assert list(input_paths(config())) == []


def test_the_bundle_is_this_package_and_the_resolved_configuration(tmp_path: Path) -> None:
    given = config("run.name=there", "distill.temperature=0.5")
    write_bundle(given, tmp_path / "job.zip")
    with zipfile.ZipFile(tmp_path / "job.zip") as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "there")
    assert not any("__pycache__" in name or name.startswith("tests") for name in names)
    assert load_config(str(tmp_path / "there" / CONFIG_NAME)) == given
    assert (tmp_path / "job.zip").stat().st_size < 1_000_000
    code = "import ckd_ray, ckd_ray.config as c; print(ckd_ray.__file__); c.quickstart_text()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env={"PYTHONPATH": str(tmp_path / "there")},
    )
    assert done.stdout.strip() == str(tmp_path / "there/ckd_ray/__init__.py"), done.stderr
    write_bundle(given, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "job.zip").read_bytes()


def test_a_job_s_command_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    request = JobRequest("label", ["--suggest", "a b; rm", "--json"], config("run.storage=s3://b/r"), 3)
    assert request.run == "s3://b/r/quickstart"
    line = request.entrypoint()
    assert "-m ckd_ray label --suggest 'a b; rm' --json --config \"$job/job.yaml\"" in line
    assert "topsecret" not in str(request.environment())
    assert request.environment()["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert request.environment()["CKD_RAY_WAIT_FOR_NODES"] == "3"
    assert request.new_id() != request.new_id() and request.new_id().startswith("quickstart-label-")


def test_options_travel_and_where_it_runs_does_not() -> None:
    import inspect

    from ckd_ray.cli.command import job_words
    from ckd_ray.cli.run import evaluate, label, train

    def words(command: Any, **given: Any) -> list[str]:
        signature = inspect.signature(command)
        return job_words(signature, {p.name: p.default for p in signature.parameters.values()} | given)

    assert words(train) == []
    given = {"start": "embed", "fresh": True, "json_": True, "cluster": "c.yaml", "yes": True, "set_": ["a=1"]}
    assert words(train, **given, config="x.yaml", down=True) == ["--from", "embed", "--fresh", "--json"]
    assert words(label, suggest="out", suggest_top=5) == ["--suggest", "out", "--suggest-top", "5"]
    assert words(label, suggest_min=0.0) == ["--suggest-min", "0.0"]
    given = {"against": "r", "quiet": True, "verbose": True}
    assert words(evaluate, **given) == ["--against", "r", "--verbose", "--quiet"]


def test_a_log_is_taken_apart_whatever_its_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    log = f"Running entrypoint\n{BEGIN}\nembed: starting\n\n{MARK}" + '{"a": 1}\nlast words'
    for size in (1, 3, 10_000):
        objects = io.StringIO()
        printer = Printer(objects)
        for i in range(0, len(log), size):
            printer.take(log[i : i + size])
        printer.end()
        assert printer.taken == len(log)
        assert objects.getvalue() == '{"a": 1}\n'
        out, err = capsys.readouterr()
        assert out == "" and err == "embed: starting\n\nlast words\n"
    printer = Printer(None)  # without --json the object is nobody's; a job that never began shows what Ray said
    printer.take("no such package\n")
    printer.end()
    assert capsys.readouterr().err == "no such package\n"


def test_a_token_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "auth_token"
    assert ensure_token(path)
    made = path.read_text()
    assert len(made) == 64 and stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert not ensure_token(path)
    assert path.read_text() == made and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nobody_to_ask_is_no_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert confirmed("start?", yes=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(UserError, match="-y answers yes"):
        confirmed("start?", yes=False)


def test_what_a_node_sees(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(b"1" * 200_000)
    (tmp_path / "a" / "deep" / "y").write_bytes(b"2")
    seen = look_at(str(tmp_path / "a"))
    assert seen is not None and set(seen) == {"x", "deep/y"}
    os.utime(tmp_path / "a" / "x", (1, 1))  # a copy has another time
    assert look_at(str(tmp_path / "a")) == seen
    (tmp_path / "a" / "x").write_bytes(b"1" * 199_999 + b"3")
    assert look_at(str(tmp_path / "a")) != seen
    assert look_at(str(tmp_path / "nowhere")) is None
    assert set(look_at(str(tmp_path / "a" / "x")) or {}) == {""}


def test_a_node_that_does_not_share_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_SEEN_WITHIN_S", 0.0)
    with nodes._probe(str(tmp_path / "runs")) as probe:
        assert probe is not None
        here = look_at(str(tmp_path))
        assert nodes._answer([str(tmp_path), str(tmp_path / "nowhere")], probe) == ([here, None], True)
        assert nodes._answer([], f"{probe}-elsewhere") == ([], False)
    assert list((tmp_path / "runs").iterdir()) == []
    with nodes._probe(None) as nothing:
        assert nodes._answer([], nothing) == ([], True)
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"run\.storage: this folder cannot be written to"),
        nodes._probe(str(tmp_path / "file" / "x")),
    ):
        pass


def test_results_do_not_cover_a_run_of_this_machine(tmp_path: Path) -> None:
    assert local_folder(tmp_path, "r", "c") == tmp_path / "r"
    (tmp_path / "r").mkdir()
    assert local_folder(tmp_path, "r", "c") == tmp_path / "r-c"
    (tmp_path / "r" / ".fetched").touch()
    assert local_folder(tmp_path, "r", "c") == tmp_path / "r"


def test_a_tunnel_that_cannot_open_says_why_and_opens_again_after_it_broke(tmp_path: Path) -> None:
    """A stand-in for ssh forwards nothing, but listens where it is told to; killed, it is started again."""
    refuse = tmp_path / "refuse"
    script = tmp_path / "ssh"
    script.write_text(
        f"#!{sys.executable}\nimport os, socket, sys, time\n"
        f"if os.path.exists({str(refuse)!r}): sys.exit('host unreachable')\n"
        "port = int(sys.argv[sys.argv.index('-L') + 1].split(':')[1])\n"
        "server = socket.create_server(('127.0.0.1', port))\nwhile True: server.accept()\n"
    )
    script.chmod(0o755)
    with Tunnel([str(script), "user@head"]) as tunnel:
        tunnel.ensure()
        first = tunnel._process
        assert first is not None
        tunnel.ensure()
        assert tunnel._process is first
        refuse.touch()
        first.kill()
        first.wait()
        with pytest.raises(ConnectionError, match="host unreachable"):
            tunnel.ensure()
        refuse.unlink()
        address = tunnel.address
        tunnel.ensure()
        assert tunnel._process is not first and tunnel.address == address
        assert tunnel._process is not None and os.getpgid(tunnel._process.pid) != os.getpgid(0)
        last = tunnel._process
    assert last.poll() is not None
