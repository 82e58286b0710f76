"""The command line as a user meets it: real processes, exit statuses, standard output for programs only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import typer

from ckd_ray.cli import app
from ckd_ray.cli.command import guarded, put
from ckd_ray.errors import JobError, UserError
from ckd_ray.model import ColBERT, ColBERTSettings
from tests.support import overrides

COMMAND = [sys.executable, "-m", "ckd_ray"]


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=400, env={**os.environ, **environment}
    )


def sets(values: list[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def test_help_is_quick_and_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys; sys.argv = ['ckd-ray', '--help']\n"
        "from ckd_ray.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: print(e.code, 'ray' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False False"
    shown = [word for line in done.stdout.splitlines() if (word := line.lstrip("│╭─ ").split(" ")[0])]
    panels = {
        "Run": "init train tune compare embed retrieve label distill evaluate",
        "Look": "report inspect search",
        "Share": "export",
        "Clusters": "plan doctor status attach down",
    }
    expected = [word for panel, commands in panels.items() for word in (panel, *commands.split())]
    assert [word for word in shown if word in expected] == expected
    assert "--install-completion" in done.stdout


@pytest.mark.parametrize("lost", [True, False])
def test_a_command_that_has_lost_its_ray_leaves_at_once(lost: bool) -> None:
    """Ray's threads may crash while Python closes without it."""
    code = (
        "import atexit, sys\n"
        "from ckd_ray.cli import command\n"
        "from ckd_ray.ray_util import watch\n"
        "def app():\n"
        f"    watch._why = 'lost' if {lost} else None\n"
        "    print('told')\n"
        "    sys.exit(1)\n"
        "command.app = app\n"
        "atexit.register(print, 'closed')\n"
        "command.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ("told\n" if lost else "told\nclosed\n"), done.stderr


def test_no_arguments_show_the_help() -> None:
    done = call()
    assert done.returncode == 0 and "Clusters" in done.stdout and done.stderr == ""


def test_every_command_speaks_to_programs_and_can_be_quiet() -> None:
    commands = typer.main.get_group(app).commands
    options = {name: {o for p in command.params for o in p.opts} for name, command in commands.items()}
    assert len(options) > 10 and [n for n, has in options.items() if not {"--json", "--quiet"} <= has] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--set", "distill.temperatur=1"], "did you mean distill.temperature?"),
        (["embed", "--set", "distill.temperatur=1"], "did you mean distill.temperature?"),
        (["train", "--until", "nowhere"], "unknown stage"),
        (["train", "--from", "label", "--until", "embed"], "--from: embed does not need this stage"),
        (["train", "--from", "label", "--set", "distill.objective=contrastive"], "--from: evaluate does not need this"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--set", "model.backbone=./no/such/folder"], "model.backbone: this folder does not exist"),
        (["embed", "--set", "teacher.checkpoint=./no/such"], "teacher.checkpoint: this folder does not exist"),
        (["train", "--bogus"], "--bogus"),
        (["trian"], "trian"),
        (["train", "--cluster", "cluster.yaml"], "this file does not exist"),
        (["train", "--cluster", "http://127.0.0.1:1"], "no dashboard answers here"),
        (["embed", "--down"], "--down, --keep"),
        (["down", "http://127.0.0.1:1", "-y"], "can be taken down"),
        (["train", "--cluster", "127.0.0.1:1"], "this Ray cannot be joined"),
    ],
)
def test_wrong_input_exits_with_two_and_no_traceback(arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_bad_input_files_exit_with_two(tmp_path: Path) -> None:
    (tmp_path / "collection.tsv").write_text("no tab\n")
    for name in ("queries", "qrels"):
        (tmp_path / f"{name}.train.tsv").write_text("")
    values = ["collection.format=msmarco", f"collection.path={tmp_path}", f"run.storage={tmp_path / 'runs'}"]
    done = call("train", "--cluster", "local", *sets(values))
    assert done.returncode == 2
    assert "collection.tsv:1: a line without a tab" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def running_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`ray start --head` of our own, on a port of its own."""
    port = 26379
    folder = tmp_path_factory.mktemp("ray", numbered=True)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [
        f"--port={port}",
        "--include-dashboard=false",
        "--object-store-memory=157286400",
        "--disable-usage-stats",
    ]
    process = subprocess.Popen(
        [*command, "--min-worker-port=0", "--max-worker-port=0"],
        stdout=(folder / "out").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )
    deadline = time.monotonic() + 60
    while "Ray runtime started" not in (folder / "out").read_text():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "out").read_text()
        time.sleep(0.2)
    yield f"127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_killed_driver_loses_no_shard_and_the_same_command_goes_on(
    running_head: str, tmp_path: Path, tiny_backbone: str, tiny_collection: str
) -> None:
    """kill -9 of the driver in the middle of embedding, then once more: on a running `ray start --head`."""
    settings = ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)
    ColBERT.from_backbone(tiny_backbone, settings, seed=1).save(tmp_path / "given")
    changes = ("embed.passages_per_shard=2", "embed.actors=1", f"teacher.checkpoint={tmp_path / 'given'}")
    values = sets(overrides(tmp_path, tiny_backbone, tiny_collection, *changes))
    environment = {**os.environ, "RAY_ADDRESS": running_head}
    folder = tmp_path / "tiny" / "embeddings" / "passages"
    process = subprocess.Popen([*COMMAND, "embed", *values], stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 200
    while len(list(folder.glob("*.arrow"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)  # its actors are gone with it
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.arrow")}
    assert 3 <= len(before) < 30, "the kill came too late to mean anything"
    done = call("embed", *values, "--json", RAY_ADDRESS=running_head)
    assert done.returncode == 0, done.stderr
    assert "joined Ray at" in done.stderr and f"{len(before)} shards are there already" in done.stderr
    assert "another ckd-ray works in this run" not in done.stderr
    after = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.arrow")}
    assert len(after) == 30 and {name: after[name] for name in before} == before
    summary = json.loads(done.stdout)
    assert [s["name"] for s in summary["stages"]] == ["collection", "teacher", "embed"]
    assert [s["skipped"] for s in summary["stages"]] == [True, True, False]
    assert summary["stages"][2]["figures"]["count"] == 60


def test_ctrl_c_in_training_exits_with_130_and_keeps_the_checkpoints(
    running_head: str, tmp_path: Path, tiny_backbone: str, tiny_collection: str
) -> None:
    changes = ("teacher.steps=1000000", "teacher.checkpoint_every=5")
    values = sets(overrides(tmp_path, tiny_backbone, tiny_collection, *changes))
    process = subprocess.Popen(
        [*COMMAND, "train", *values],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": running_head},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    checkpoints = tmp_path / "tiny" / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("teacher-*/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "interrupted; the same command goes on" in stderr and "Traceback" not in stderr
    assert list(checkpoints.glob("teacher-*/step-*")) and not (tmp_path / "tiny" / ".lock").exists()


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path, tiny_backbone: str, tiny_collection: str) -> None:
    from ckd_ray.errors import UserError
    from ckd_ray.runs.lock import run_lock

    run = str(tmp_path / "run")
    with run_lock(run):
        with (
            pytest.raises(UserError, match=f"another ckd-ray works in this run(.|\n)*process {os.getpid()}"),
            run_lock(run),
        ):
            pass
    (tmp_path / "run" / ".lock").write_text(json.dumps({"host": __import__("socket").gethostname(), "pid": 2**22 + 1}))
    with run_lock(run):  # the lock of a process that is gone
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run" / ".lock").exists()


def test_what_others_print_does_not_reach_standard_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray prints warnings of its daemons to both streams; `--json` promises one object and nothing else."""
    from contextlib import contextmanager

    from ckd_ray.jobs import session as around
    from ckd_ray.streams import only_ours

    @contextmanager
    def noisy(cluster: str | None):  # type: ignore[no-untyped-def]
        print("(raylet) WARNING: starting")
        yield

    monkeypatch.setattr(around, "connected", noisy)
    monkeypatch.setattr(around, "wait_for_nodes", lambda: None)
    monkeypatch.setattr(around, "check_nodes_see", lambda config: None)
    for verbose in (False, True):
        with only_ours(verbose=verbose), around.session(None, [], None):
            print("(raylet) WARNING: 8 PYTHON worker processes have been started")
            put({"done": True})
        put({"after": "s3://key:secret@bucket/runs"})
        out, err = capsys.readouterr()
        assert out == '{"done": true}\n{"after": "s3://***@bucket/runs"}\n' and "(raylet)" not in err


def test_an_error_of_a_task_is_told_without_the_hints_of_ray_data(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise JobError("the disk is full\nmake room\nFailed to apply UDF transform after 1/1 attempts.\nTo change ...")

    with pytest.raises(typer.Exit) as ended:
        guarded(command)()
    assert ended.value.exit_code == 1 and capsys.readouterr().err == "ckd-ray: the disk is full\nmake room\n"


@pytest.mark.parametrize(("error", "status"), [(UserError("no", where="key", fix="so"), 2), (JobError("no"), 1)])
def test_an_error_of_a_task_is_told_without_ray_s_traceback(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.exceptions import RayTaskError

    def command() -> None:
        raise RayTaskError("work", "Traceback (most recent call last): ...", error).as_instanceof_cause()

    with pytest.raises(typer.Exit) as ended:
        guarded(command)()
    assert ended.value.exit_code == status and capsys.readouterr().err == f"ckd-ray: {error}\n"


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError("When listing objects: AWS Error NETWORK_CONNECTION"), True),
        (ConnectionResetError("reset by peer"), True),
        (ray.exceptions.OutOfMemoryError("1 worker(s) were killed. Memory on the node was 63GB used"), True),
        (ray.exceptions.RayTaskError("work", "Traceback", OSError("no route")).as_instanceof_cause(), True),
        (ray.exceptions.RayTaskError("work", "Traceback", KeyError("x")).as_instanceof_cause(), False),
        (FileNotFoundError(2, "No such file", "/x"), False),
        (AssertionError("a mistake of ours"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_may_pass_says_so(error: Exception, passes: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        guarded(command)()
    said = capsys.readouterr().err.splitlines()[0]
    assert ended.value.exit_code == 1
    assert said.endswith("; give the same command again: what was finished is kept") == passes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "the same command goes on"),
        ({"fresh": True}, "the same command without --fresh goes on"),
        ({"fresh": True, "start": "embed"}, "the same command without --fresh and --from goes on"),
    ],
)
def test_what_goes_on_after_ctrl_c_does_not_begin_anew(
    options: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from ckd_ray.ray_util.again import same_command

    def command(**_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit):
        guarded(command)(**options)
    assert said in capsys.readouterr().err and said.startswith(same_command()), "ray_util/watch.py says the same"
    guarded(lambda: None)()
    assert same_command() == "the same command"
