"""Which passages a training leaves out, and which texts are tried when its workers fail at a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertModel

from ckd_ray.checks import load_config
from ckd_ray.config.schema import DistillConfig, TrainingConfig
from ckd_ray.data import Collection, build_collection
from ckd_ray.distill import suspects
from ckd_ray.distill.dev import DevMeasure
from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.left_out import leave_out, left_out
from ckd_ray.distill.scale import measured_scale, scale_batch
from ckd_ray.distill.task import TrainingTask
from ckd_ray.files import write_json_atomic
from ckd_ray.model import ColBERT, ColBERTSettings
from tests.support import overrides


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> TrainingTask:
    run = tmp_path_factory.mktemp("run")
    build_collection(load_config(None, overrides(run, tiny_backbone, tiny_collection)).collection, str(run))
    settings = ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)
    ColBERT.from_backbone(tiny_backbone, settings, seed=1).save(run / "start")
    return TrainingTask("teacher", str(run), str(run / "start"), "f", 17, TrainingConfig(steps=8, batch_size=3))


def entry(index: int, cause: str) -> dict[str, Any]:
    return {"index": index, "passage_id": f"p{index}", "cause": cause}


def measuring(task: TrainingTask, **values: Any) -> TrainingTask:
    return replace(task, settings=task.settings.model_copy(update={"evaluate_every": 2, "dev_passages": 9, **values}))


def test_a_student_leaves_out_what_earlier_stages_have_set_aside(task: TrainingTask) -> None:
    student = replace(task, stage="distill", fingerprint="student", settings=DistillConfig())
    leave_out(task, [entry(4, "x")])
    assert left_out(student) == []
    for folder, ids in ((task.paths.teacher, ["p7"]), (task.paths.embeddings, ["p30", "p7"])):
        write_json_atomic(f"{folder}/_manifest.json", {"figures": {"set_aside": ids}})
    assert left_out(student) == [entry(7, "set aside by embed"), entry(30, "set aside by embed")]
    leave_out(student, [entry(2, "y"), entry(7, "y")])
    assert left_out(student) == [entry(2, "y"), entry(7, "y"), entry(30, "set aside by embed")]
    assert left_out(task) == [entry(4, "x")], "those of its own alone"
    plan = InputReader(task, ColBERT.from_pretrained(task.start).tokenizer).plan
    assert plan.left_out == {4}
    leave_out(task, [])


def test_measurements_leave_them_out(task: TrainingTask) -> None:
    model, collection = ColBERT.from_pretrained(task.start), Collection.open(task.run)
    options: dict[str, Any] = {"rank": 0, "world": 1, "device": torch.device("cpu"), "precision": "fp32"}
    before = DevMeasure(measuring(task), model, **options)
    gone = before.pool_P[[0, 5]].tolist()
    for pool in (None, before.pool_P.tolist()):
        after = DevMeasure(measuring(task), model, **options, pool=pool, left_out=gone)
        assert after.pool_P.tolist() == [p for p in before.pool_P.tolist() if p not in gone]
        assert 0.0 <= after() <= 1.0
    positives = collection.positives("train", 1)
    batch = scale_batch(positives, collection.num_passages, 17, gone)
    assert not set(batch.passages_BM.reshape(-1).tolist()) & set(gone)
    known: dict[str, Any] = {"trained": False, "seed": 17, "precision": "fp32"}
    scales = [measured_scale(model, collection, positives, **known, left_out=p) for p in ((), (), gone)]
    assert scales[0] == scales[1] != scales[2]


@pytest.mark.parametrize("step", [0, 3, 6])
def test_the_texts_that_are_tried(task: TrainingTask, step: int) -> None:
    """Those of the step and of the steps that are read ahead, of the score scale before any step, of dev."""
    measured = measuring(task)
    model = ColBERT.from_pretrained(task.start)
    reader = InputReader(task, model.tokenizer)
    batches = [reader.plan.batch(s) for s in range(8) if step <= s < step + 4]
    if step == 0:
        batches.append(scale_batch(reader.positives, 60, 17))
    expected = {("queries.train", int(q)) for batch in batches for q in batch.queries_B}
    expected |= {("passages", int(p)) for batch in batches for p in batch.passages_BM.reshape(-1)}
    texts = suspects._Trial(task).texts(step)
    assert set(texts) == expected and len(texts) == len(expected)
    dev = DevMeasure(measured, model, rank=0, world=1, device=torch.device("cpu"), precision="fp32")
    expected |= {("passages", int(p)) for p in dev.pool_P} | {("queries.dev", int(q)) for q in dev.queries_B}
    assert set(suspects._Trial(measured).texts(step)) == expected


@pytest.mark.parametrize("packed", [True, False])
def test_the_one_that_fails_is_found(
    task: TrainingTask, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(suspects, "can_pack", lambda model: False)
    trial, tries = suspects._Trial(task), str(tmp_path / "tries.json")
    texts = trial.texts(2)
    assert suspects.try_texts(task.to_dict(), 2, tries) == {}
    passage, query = (next(i for kind, i in texts if kind == wanted) for wanted in ("passages", "queries.train"))
    tokenizer = trial.model.tokenizer
    bad = [
        tokenizer.passages(trial.collection.texts([passage]), 96)[0].astype(np.int64).tobytes(),
        tokenizer.queries([trial.queries["queries.train"].texts[query]])[0].numpy().tobytes(),
    ]
    forward, gradients = BertModel.forward, list[bool]()

    def strange(self: Any, *args: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        if any(ids in input_ids.numpy().tobytes() for ids in bad):
            raise ZeroDivisionError("a strange token")
        found = forward(self, *args, input_ids=input_ids, **options)
        found.last_hidden_state.register_hook(lambda gradient: gradients.append(True))
        return found

    monkeypatch.setattr(BertModel, "forward", strange)
    cause = "ZeroDivisionError: a strange token"
    assert suspects.try_texts(task.to_dict(), 2, tries) == {
        "passages": [entry(passage, cause)],
        "queries.train": [{"index": query, "passage_id": f"q{query}", "cause": cause}],
    }
    assert gradients and not list(tmp_path.iterdir())


def test_a_gpu_without_memory_blames_no_text(
    task: TrainingTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckd_ray.embed import bad_texts
    from ckd_ray.errors import JobError

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(bad_texts, "_MEMORY_PAUSE_S", 0.0)
    monkeypatch.setattr(BertModel, "forward", full)
    with pytest.raises(JobError, match="memory does not hold one text alone"):
        suspects.try_texts(task.to_dict(), 2, str(tmp_path / "tries.json"))
