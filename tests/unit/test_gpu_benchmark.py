"""benchmarks/gpu.py on a CPU: its parts run, and its comparisons fail where they should."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckd_ray.model import ColBERT, ColBERTSettings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    import gpu

    yield gpu
    torch.set_num_threads(threads)


def test_every_part_prints_a_line_and_nothing_fails() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [part["part"] for part in parts] == ["right", "syncs", "encoder", "shard", "search", "training"]
    for part in parts:
        assert set(part) == {"part", "machine", "settings", "figures", "failures"} and part["failures"] == []
        assert part["settings"]["device"] == "cpu"
        assert bool(part["figures"]) != ("left_out" in part["settings"])
        assert all(figure["value"] is not None for figure in part["figures"].values())
    right, syncs, *_ = parts
    assert right["figures"]["planted_id_is_seen"]["value"] == 1
    assert syncs["settings"]["left_out"]


def test_a_wrong_id_of_the_device_ends_with_1(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = gpu.search_all
    answers = []

    def wrong(*arguments: Any) -> Any:
        scores, passages = search(*arguments)
        if not answers:
            passages[3, 7] += 1
        answers.append(passages)
        return scores, passages

    monkeypatch.setattr(gpu, "search_all", wrong)
    monkeypatch.setattr(gpu, "COMPARISONS", (gpu.compare_rankings,))
    assert gpu.main(["--device", "cpu", "--only", "right"]) == 1
    (failure,) = json.loads(capsys.readouterr().out)["failures"]
    assert failure.startswith("exact_search_auto: 0.99") and len(answers) == 3


def test_an_error_ends_its_part_alone(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: Any, report: Any) -> None:
        report.state("before", 1.0)
        raise RuntimeError("CUDA error: out of luck\nwith a second line")

    monkeypatch.setitem(gpu.PARTS, "shard", broken)
    assert gpu.main(["--device", "cpu", "--only", "shard", "--only", "syncs"]) == 1
    shard, syncs = map(json.loads, capsys.readouterr().out.splitlines())
    assert shard["failures"] == ["shard: RuntimeError: CUDA error: out of luck"] and "before" in shard["figures"]
    assert syncs["failures"] == []


def test_comparisons_fail_for_other_shapes_and_for_what_is_no_number(gpu: Any) -> None:
    assert gpu.agreement([1, 2, 3, 4], [1, 2, 3, 5]) == 0.75 and gpu.agreement([1, 2], [1]) == 0
    assert gpu.difference(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0])) == 0.125
    assert gpu.difference(torch.zeros(2), torch.zeros(3)) == math.inf
    report = gpu.Report()
    for value in (1.0, 0.999, math.nan):
        report.check_share("share", value)
    for value in (0.1, 0.2, math.inf, gpu.difference(torch.tensor([math.nan]), torch.ones(1))):
        report.check("error", value, 0.1)
    assert report.failures == [
        "share: 0.999, expected at least 1", "share: nan, expected at least 1", "error: 0.2, expected at most 0.1",
        "error: inf, expected at most 0.1", "error: nan, expected at most 0.1",
    ]  # fmt: skip
    assert {name: figure["value"] for name, figure in report.figures.items()} == {"share": None, "error": None}


def test_a_gradient_that_is_no_number_is_the_worst(gpu: Any) -> None:
    worst = gpu.worst_difference(gpu.Bench("cpu"), lambda x: x.clamp_min(0).sqrt(), torch.tensor([0.0, 1.0]))
    assert not math.isfinite(worst)  # the derivative of a root at 0, times 0


def test_operations_are_those_of_the_tokens(gpu: Any, tiny_backbone: str) -> None:
    model = ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48))
    # Two layers of 4 * 32^2 and 2 * 32 * 64 weights, and the projection; twice that, and attention, for 10 tokens.
    ten = 10 * 2 * (2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 16) + 2 * 4 * 100 * 32
    assert gpu.operations(model, np.array([10])) == ten and gpu.operations(model, np.array([10, 10])) == 2 * ten
    assert gpu.matmul_rate(gpu.Bench("cpu"), "fp32", 64) > 0


def test_passages_of_64_tokens_fill_a_gpu_s_batch_without_padding(gpu: Any) -> None:
    tokenizer = gpu.random_model("tiny").tokenizer
    assert {len(ids) for ids in tokenizer.passages(gpu.random_texts(20, median=61.5, spread=0.0))} == {64}
    ragged = tokenizer.passages(gpu.random_texts(500))
    assert 70 < np.mean([len(ids) for ids in ragged]) < 90
    assert 0.05 < np.mean(~tokenizer.keeps(np.concatenate(ragged))) < 0.15


def test_synchronisations_are_counted_by_place(gpu: Any) -> None:
    text = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:150.)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for line in (7, 9, 7):
            warnings.warn_explicit(text, UserWarning, "/site-packages/ckd_ray/distill/step.py", line)
        warnings.warn_explicit("something else", UserWarning, "/site-packages/ckd_ray/distill/step.py", 7)
    assert gpu.counted_places(caught) == {"ckd_ray/distill/step.py:7": 2, "ckd_ray/distill/step.py:9": 1}
