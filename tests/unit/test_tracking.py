"""The trackers, read back from what they have written; what fails in one ends it alone."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ckd_ray import tracking
from ckd_ray.config import Config
from ckd_ray.config.schema import TrackingConfig
from ckd_ray.tracking import TrackedRun, tracked, trackers
from tests.support import tensorboard_events

CONFIG = {"distill": {"steps": 4, "beta": "auto", "learning_rate": 0.001}, "evaluate": {"measures": ["MRR@10"]}}


def run_in(folder: Path | str, config: dict[str, Any] = CONFIG) -> TrackedRun:
    return TrackedRun(name="tiny", group="tiny", project="tests", config=config, folder=f"{folder}/tracking")


def told(name: str, run: TrackedRun, first: int = 0) -> None:
    """Four steps of a training and a measure."""
    with tracked(TrackingConfig(to=[name]), run) as found:
        for step in range(first, first + 4):
            found.scalars({"distill/loss": 1.0 / (1 + step), "distill/mrr@10": 0.5}, step, 1.7e9 + step)
        found.summary({"evaluate/test/student/MRR@10": 0.25})


@pytest.fixture(autouse=True)
def _every_tracker_again() -> Iterator[None]:
    tracking.forget_failures()
    yield
    tracking.forget_failures()


def test_a_list_stands_for_the_trackers() -> None:
    short = Config.model_validate({"tracking": ["tensorboard", "wandb"]})
    assert short.tracking.to == ["tensorboard", "wandb"] and short.tracking.project == "ckd-ray"
    assert Config.model_validate(short.model_dump(mode="json")) == short and Config().tracking.to == []
    for wrong in (["tensorboards"], {"too": []}, "wandb", [1]):
        with pytest.raises(ValidationError):
            Config.model_validate({"tracking": wrong})


def test_tensorboard_s_events_hold_the_scalars_and_the_configuration(tmp_path: Path) -> None:
    told("tensorboard", run_in(tmp_path))
    found = tensorboard_events(tmp_path / "tracking" / "tensorboard")
    assert found["distill/loss"] == [(step, pytest.approx(1 / (1 + step))) for step in range(4)]
    assert found["distill/mrr_10"] == [(step, 0.5) for step in range(4)]
    assert found["evaluate/test/student/MRR_10"] == [(0, 0.25)]
    assert b"learning_rate: 0.001" in found["config/text_summary"][0][1][0]
    (start,) = found["_hparams_/session_start_info"]
    assert b"distill.beta" in start[1] and b'["MRR@10"]' in start[1]
    assert b"evaluate/test/student/MRR_10" in found["_hparams_/experiment"][0][1]


def test_events_of_a_run_in_object_storage_are_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckd_ray.tracking import to_tensorboard

    monkeypatch.setattr(to_tensorboard, "is_local", lambda uri: False)
    monkeypatch.setattr(to_tensorboard, "_UPLOAD_EVERY_S", 0.0)
    told("tensorboard", run_in(f"file://{tmp_path}"))
    assert len(tensorboard_events(tmp_path / "tracking" / "tensorboard")["distill/loss"]) == 4


def test_a_trial_of_a_search_is_a_run_of_its_own(tmp_path: Path) -> None:
    from ckd_ray.runs.directory import RunContext
    from ckd_ray.tune.job import _track
    from ckd_ray.tune.records import Trial

    config = Config.model_validate({"tracking": ["tensorboard"], "run": {"storage": str(tmp_path)}})
    values = {"distill.temperature": 0.5, "distill.learning_rate": 0.001}
    trial = Trial(3, values, "stopped", measurements=[[2, 0.25, 1.0], [4, 0.5, 2.5]], seconds=2.5, ended=0)
    _track(RunContext.of(config), str(tmp_path), trial)
    found = tensorboard_events(tmp_path / "tracking" / "trial-00003" / "tensorboard")
    assert found["trial/mrr_10"] == [(2, 0.25), (4, 0.5)] and found["trial/best_mrr_10"] == [(0, 0.5)]
    assert found["trial/steps"] == [(0, 4)] and found["trial/seconds"] == [(0, 2.5)]
    assert b"distill.temperature" in found["_hparams_/session_start_info"][0][1]


def test_mlflow_s_store_holds_them_and_the_same_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(None)
    run = run_in(tmp_path)
    told("mlflow", run)
    told("mlflow", run, first=4)
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "tests"]
    (stored,) = client.search_runs([experiment.experiment_id])
    assert stored.info.run_name == "tiny" and stored.info.status == "FINISHED"
    assert stored.data.params["distill.steps"] == "4" and stored.data.params["evaluate.measures"] == "['MRR@10']"
    assert stored.data.tags["ckd_ray.run"] == "tiny"
    history = client.get_metric_history(stored.info.run_id, "distill/loss")
    assert [(m.step, m.value) for m in history] == [(step, pytest.approx(1 / (1 + step))) for step in range(8)]
    assert [m.timestamp for m in history][:2] == [1_700_000_000_000, 1_700_000_001_000]
    assert stored.data.metrics["evaluate/test/student/MRR_10"] == 0.25
    # Another configuration is another run, and so is the same one after its run was deleted.
    other = run_in(tmp_path, {"distill": {"steps": 5}})
    told("mlflow", other)
    (second,) = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_id != stored.info.run_id]
    client.delete_run(second.info.run_id)
    with pytest.raises(ZeroDivisionError), tracked(TrackingConfig(to=["mlflow"]), other) as found:
        found.scalars({"distill/loss": 1.0}, 8)
        raise ZeroDivisionError
    (third,) = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_id != stored.info.run_id]
    assert third.info.run_id != second.info.run_id and third.info.status == "FAILED"


def test_wandb_keeps_them_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = f"""
        from tests.unit.test_tracking import run_in, told
        told("wandb", run_in({str(tmp_path)!r}))
    """
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0 and done.stdout == "" and "tracking:" not in done.stderr, done.stderr
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    rows, summary, config, name = offline(file)
    assert [(row["distill/step"], row["distill/loss"]) for row in rows] == [
        (step, pytest.approx(1 / (1 + step))) for step in range(4)
    ]
    assert summary["evaluate/test/student/MRR_10"] == 0.25 and name == "tiny"
    assert config["distill"]["steps"] == 4 and config["evaluate"] == {"measures": ["MRR@10"]}


def offline(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], str]:
    """(history, summary, configuration, name) of the file that `wandb sync` sends."""
    from wandb.proto import wandb_internal_pb2

    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    config: dict[str, Any] = {}
    name = ""
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append(of_items(record.history.item))
        elif kind == "summary":
            summary |= of_items(record.summary.update)
        elif kind == "run":
            config |= of_items(record.run.config.update)
            name = record.run.display_name
    return rows, summary, config, name


def of_items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's form, after the seven bytes that name the file: checksum, length, kind (whole,
    first, middle, last) and bytes, in blocks of 32 KiB."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that holds no head
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def test_a_listener_is_told_of_each_record_once_and_in_order() -> None:
    from ckd_ray.distill.progress_actor import ProgressActor
    from ckd_ray.distill.trainer import _Listening

    told_of: list[int] = []
    listening = _Listening(lambda records: told_of.extend(r["step"] for r in records), last=1)  # 0 and 1: earlier
    actor = ProgressActor()
    for step in range(5):
        actor.report(step + 1, 0.5, {"step": step})
    actor.report(6, 0.4)  # a step without a record
    assert actor.state()["step"] == 6 and "_records" not in actor.state()
    listening.tell(actor.records_after(1))
    listening.tell([{"step": 3}, {"step": 4}, {"step": 5}])  # a worker that resumes after a loss takes steps again
    listening.tell([{"step": step} for step in range(6)])  # all records at the end
    assert told_of == [2, 3, 4, 5]


class Broken:
    """A tracker that fails at its second step, or that never begins."""

    identity = "broken"
    seen: list[int] = []  # noqa: RUF012
    waits: threading.Event | None = None

    def __init__(self, run: TrackedRun, identity: str | None) -> None:
        if self.waits:
            self.waits.wait()

    def scalars(self, values: dict[str, float], step: int, time: float) -> None:
        self.seen.append(step)
        if step == 1:
            raise ConnectionError("the server is gone\nand so on")

    def summary(self, values: dict[str, float]) -> None:
        raise AssertionError

    def close(self, status: str) -> None:
        raise AssertionError


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[Broken]:
    module = importlib.import_module("ckd_ray.tracking.to_tensorboard")
    monkeypatch.setattr(module, "TensorBoard", Broken)
    monkeypatch.setattr(Broken, "seen", [])
    return Broken


def test_a_failure_is_said_once_and_ends_the_tracker_alone(
    broken: type[Broken], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # as in a search, whose trials are runs of their own
        told("tensorboard", run_in(tmp_path))
    assert broken.seen == [0, 1]
    assert capsys.readouterr().err == (
        "tracking: tensorboard: ConnectionError: the server is gone; the run goes on without it\n"
    )
    tracking.forget_failures()  # the next command tries again
    told("tensorboard", run_in(tmp_path))
    assert broken.seen == [0, 1, 0, 1]


def test_a_tracker_that_does_not_answer_holds_nothing_up(
    broken: type[Broken], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(Broken, "waits", released)
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.3)
    told("tensorboard", run_in(tmp_path))
    released.set()
    for thread in threading.enumerate():
        if thread.name == "track-tensorboard":
            thread.join(10)
    assert capsys.readouterr().err == "tracking: tensorboard: no answer for 0 s; the run goes on without it\n"


def test_a_missing_library_is_said_before_anything_is_tracked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(Path(__file__).parents[2])])
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with tracked(TrackingConfig(to=["mlflow"]), run_in(tmp_path)) as found:
        assert not found.active
        assert capsys.readouterr().err == (
            "tracking: mlflow: mlflow-skinny is not installed (pip install mlflow-skinny); the run goes on without it\n"
        )
        found.scalars({"distill/loss": 1.0}, 0)
    assert not (tmp_path / "tracking").exists()
