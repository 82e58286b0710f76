"""Passages on which the encoder raises, or dies, in training: found, named and left out, and nothing else changes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertModel

from ckd_ray.checks import load_config
from ckd_ray.config.schema import TrainingConfig
from ckd_ray.data import Collection, build_collection
from ckd_ray.distill import suspects, worker
from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.left_out import leave_out
from ckd_ray.distill.task import TrainingTask
from ckd_ray.distill.trainer import TrainingOutcome, fit
from ckd_ray.errors import JobError
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.colbert import load_tokenizer
from ckd_ray.pipeline.training import distill_task
from ckd_ray.runs.directory import RunContext
from tests.fault.processes import below
from tests.finished import Finished
from tests.support import overrides

STEP = 5  # at which the bad passage is drawn first, two steps after a checkpoint


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> TrainingTask:
    run = tmp_path_factory.mktemp("training")
    build_collection(load_config(None, overrides(run, tiny_backbone, tiny_collection)).collection, str(run))
    ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48), seed=1).save(
        run / "start"
    )
    settings = TrainingConfig(
        steps=8, batch_size=2, learning_rate=1e-3, log_every=1, checkpoint_every=3, score_scale=1.0
    )
    return TrainingTask("teacher", str(run), str(run / "start"), "straight", 17, settings, dropout=0.1, max_bad=1)


@pytest.fixture
def student(ray_session: None, finished_run: Finished, tmp_path: Path) -> TrainingTask:
    finished_run.copy(tmp_path)
    values = finished_run.values(tmp_path, "distill.steps=8", "distill.batch_size=2")
    config = load_config(None, [*values, "distill.checkpoint_every=3", "distill.evaluate_every=0"])
    return replace(distill_task(RunContext.of(config), "student"), max_bad=1)


def drawn_first(task: TrainingTask, at: int) -> int:
    """A passage that no step before `at` draws."""
    plan = InputReader(task, load_tokenizer(task.start)).plan
    before = {p for step in range(at) for p in plan.batch(step).passages_BM.reshape(-1).tolist()}
    return next(p for p in plan.batch(at).passages_BM.reshape(-1).tolist() if p not in before)


def ids_of(task: TrainingTask, passage: int) -> bytes:
    return load_tokenizer(task.start).passages(Collection.open(task.run).texts([passage]))[0].astype(np.int64).tobytes()


def fragile(monkeypatch: pytest.MonkeyPatch, bad: bytes, fail: Callable[[], None]) -> None:
    """The workers of trainings, and the tasks that try texts, call `fail` where the encoder meets these token ids."""

    def inside(module: str, function: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            import importlib

            forward = BertModel.forward

            def guarded(self: Any, *args: Any, input_ids: torch.Tensor, **options: Any) -> Any:
                if bad in input_ids.numpy().tobytes():
                    fail()
                return forward(self, *args, input_ids=input_ids, **options)

            BertModel.forward = guarded
            return getattr(importlib.import_module(module), function)(*arguments)

        return run

    for module, function in ((worker, "train_worker"), (suspects, "try_texts")):
        monkeypatch.setattr(module, function, inside(module.__name__, function))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def strange() -> None:
    raise ZeroDivisionError("a strange token")


def losses(outcome: TrainingOutcome) -> list[float]:
    assert [record["step"] for record in outcome.metrics] == list(range(8))
    return [record["loss"] for record in outcome.metrics]


def same(one: Path, other: Path) -> bool:
    pairs = zip(*(ColBERT.from_pretrained(folder).parameters() for folder in (one, other)), strict=True)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def known_from_the_start(task: TrainingTask, bad: int, out: Path) -> TrainingOutcome:
    knowing = replace(task, fingerprint="knowing")
    leave_out(knowing, [{"index": bad, "passage_id": f"p{bad}", "cause": "x"}])
    return fit(knowing, out=str(out), workers=1)


@pytest.mark.slow
def test_a_passage_that_ends_the_workers_is_named_and_left_out(
    ray_session: None, teacher: TrainingTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A worker that is killed by chance afterwards changes nothing."""
    bad = drawn_first(teacher, STEP)
    straight = losses(fit(teacher, out=str(tmp_path / "straight"), workers=1))
    expected = known_from_the_start(teacher, bad, tmp_path / "knowing")
    fragile(monkeypatch, ids_of(teacher, bad), kill)
    task = replace(teacher, fingerprint="dies")
    killed: list[int] = []
    killer = threading.Thread(target=_kill_a_worker_after, args=(Path(task.checkpoints) / "set-aside.json", killed))
    killer.start()
    outcome = fit(task, out=str(tmp_path / "model"), workers=1)
    killer.join()
    assert killed
    named = {"index": bad, "passage_id": f"p{bad}", "cause": "the encoder's process dies on it"}
    assert outcome.set_aside == [named]
    assert losses(outcome)[:STEP] == pytest.approx(straight[:STEP], abs=1e-5)
    assert losses(outcome) == pytest.approx(losses(expected), abs=1e-5)
    assert abs(losses(outcome)[STEP] - straight[STEP]) > 1e-5
    assert same(tmp_path / "model", tmp_path / "knowing")
    told = capsys.readouterr().err
    assert f"teacher: the workers fail at step {STEP}" in told and f"p{bad} (the encoder's process dies" in told


def _kill_a_worker_after(path: Path, killed: list[int]) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not killed:
        time.sleep(0.1)
        for process in below(os.getpid()) if path.exists() else ():
            with suppress(ProcessLookupError):
                if "RayTrainWorker" in process.title:
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    break


def test_a_passage_on_which_the_encoder_raises_in_a_distillation(
    student: TrainingTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the allowance the command ends and names it; with a larger one it goes on from the last checkpoint."""
    bad = drawn_first(student, STEP)
    name = Collection.open(student.run).passage_ids([bad])[0]
    expected = known_from_the_start(student, bad, tmp_path / "knowing")
    fragile(monkeypatch, ids_of(student, bad), strange)
    with pytest.raises(
        JobError, match=rf"distill: .* on 1 passages, and 0 may be .*: {name} \(ZeroDivisionError: a st"
    ):
        fit(replace(student, max_bad=0), out=str(tmp_path / "model"), workers=1)
    outcome = fit(student, out=str(tmp_path / "model"), workers=1, max_failures=0)
    assert [(entry["index"], entry["passage_id"]) for entry in outcome.set_aside] == [(bad, name)]
    assert losses(outcome) == pytest.approx(losses(expected), abs=1e-5)
    assert same(tmp_path / "model", tmp_path / "knowing")


def test_a_query_on_which_the_encoder_raises_ends_training(
    ray_session: None, teacher: TrainingTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(teacher.start)
    query = int(InputReader(teacher, tokenizer).plan.batch(1).queries_B[0])
    text = Collection.open(teacher.run).queries("train").texts[query]
    fragile(monkeypatch, tokenizer.queries([text])[0].numpy().tobytes(), strange)
    with pytest.raises(JobError, match=rf"teacher: .* on 1 of queries.train: q{query} \(ZeroDivisionError"):
        fit(replace(teacher, fingerprint="query"), out=str(tmp_path / "model"), workers=1, max_failures=0)


def test_workers_that_die_by_chance_at_one_step_blame_no_text(
    ray_session: None, teacher: TrainingTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    deaths = tmp_path / "deaths"

    def twice() -> None:
        if not deaths.exists() or len(deaths.read_text()) < 2:
            with deaths.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)

    straight = fit(replace(teacher, fingerprint="calm"), out=str(tmp_path / "calm"), workers=1)
    fragile(monkeypatch, ids_of(teacher, drawn_first(teacher, STEP)), twice)
    outcome = fit(replace(teacher, fingerprint="chance", max_bad=0), out=str(tmp_path / "model"), workers=1)
    assert deaths.read_text() == "xx" and outcome.set_aside == []
    assert losses(outcome) == pytest.approx(losses(straight), abs=1e-5)
    assert same(tmp_path / "model", tmp_path / "calm")
    assert "the workers fail at step" in capsys.readouterr().err
