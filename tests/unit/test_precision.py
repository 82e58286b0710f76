"""Which precision is chosen: by the device that computes, and never one that it only emulates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.encoder import TextEncoder, choose_precision, precision_of_gpus
from ckd_ray.pipeline import precision
from ckd_ray.ray_util.actor_pool import Node
from ckd_ray.ray_util.gpus import Kinds, _a_node_of_each_kind

T4, A10G = {"Tesla T4": (7, 5)}, {"NVIDIA A10G": (8, 6)}


@pytest.mark.parametrize(
    ("kinds", "expected"), [(T4, "fp32"), (A10G, "bf16"), (T4 | A10G, "fp32"), ({"NVIDIA H200": (9, 0)}, "bf16")]
)
def test_bf16_needs_a_gpu_that_computes_it(kinds: Kinds, expected: str) -> None:
    chosen, reason = precision_of_gpus(kinds)
    assert chosen == expected and ("Tesla T4 would only emulate" in reason) == ("Tesla T4" in kinds)


def test_a_local_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says that a T4 supports bfloat16, which it emulates."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    model: Any = None
    assert choose_precision(model, "auto", "cuda")[0] == "fp32"
    assert choose_precision(model, "fp16", "cuda") == ("fp16", "as configured")


def cluster(monkeypatch: pytest.MonkeyPatch, nodes: list[Node], kinds: Kinds | None) -> list[float]:
    """A cluster of these nodes and kinds of GPU, in place of a real one; the shares with which kinds were asked for."""
    asked: list[float] = []

    def answer(share: float) -> Kinds:
        asked.append(share)
        assert kinds is not None
        return kinds

    monkeypatch.setattr(precision, "cluster_nodes", lambda: (nodes, nodes))
    monkeypatch.setattr(precision, "kinds_of_gpus", answer)
    return asked


def test_the_processes_that_compute_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def unread() -> ColBERT:
        raise AssertionError("weights that nobody measures were loaded")

    asked = cluster(monkeypatch, [Node(8), Node(8, 1)], T4)
    assert precision.precision_on_cluster(unread, "auto", "auto", "embed.precision")[0] == "fp32"
    assert precision.precision_on_cluster(unread, "auto", 0.5, "embed.precision")[0] == "fp32"
    assert precision.precision_on_cluster(None, "auto", 0.25, "cross_encoder.precision")[0] == "fp32"
    assert asked == [1.0, 0.5, 0.25]
    assert precision.precision_on_cluster(unread, "fp16", "auto", "embed.precision") == ("fp16", "as configured")
    with pytest.raises(UserError, match=r"embed\.precision: int8 is for CPUs"):
        precision.precision_on_cluster(unread, "int8", "auto", "embed.precision")


def test_actors_on_cpus_are_no_gpus(monkeypatch: pytest.MonkeyPatch, tiny_backbone: str) -> None:
    """`gpus_per_actor: 0` on a cluster whose GPUs compute bfloat16."""
    asked = cluster(monkeypatch, [Node(8, 4)], None)
    model = ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48))
    _, reason = precision.precision_on_cluster(lambda: model, "auto", 0, "embed.precision")
    assert "measured here" in reason
    with pytest.raises(UserError, match=r"embed\.precision: fp16 is for GPUs"):
        precision.precision_on_cluster(lambda: model, "fp16", 0, "embed.precision")
    with pytest.raises(UserError, match=r"cross_encoder\.precision: fp16 is for GPUs"):
        precision.precision_on_cluster(None, "fp16", 0, "cross_encoder.precision")
    assert precision.precision_on_cluster(None, "auto", 0, "cross_encoder.precision") == ("fp32", "on CPUs")
    assert not asked


def test_a_precision_is_chosen_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for choose in (lambda: ("fp32", "on CPUs"), lambda: ("bf16", "as configured")):
        assert precision.agreed_precision(str(tmp_path), "cross_encoder", choose, "kept.json") == "fp32"
    assert (tmp_path / "kept.json").is_file() and "cross_encoder: fp32 (on CPUs)" in capsys.readouterr().err


def test_each_kind_of_gpu_is_asked_once() -> None:
    def node(name: str, kind: str, gpus: float, alive: bool = True) -> dict[str, Any]:
        return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 8.0, "GPU": gpus, f"accelerator_type:{kind}": 1.0}}

    nodes = [node("a", "T4", 1), node("b", "T4", 4), node("c", "A10G", 1), node("d", "H100", 8, False)]
    nodes.append({"NodeID": "head", "Alive": True, "Resources": {"CPU": 4.0}})
    assert _a_node_of_each_kind(nodes) == ["a", "c"]


def test_an_overflow_of_float16_is_an_error_of_the_setting(tiny_backbone: str) -> None:
    """Not one of a text, which would be set aside."""
    model = ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)).eval()
    tokens = model.tokenizer.passages(["ban bel", "rost."])
    exact = TextEncoder(model).passages(tokens).embeddings_TD.float()
    fine = TextEncoder(model, precision="fp16").passages(tokens).embeddings_TD.float()
    assert 0 < float((exact - fine).abs().max()) < 0.02
    with torch.no_grad():
        model.backbone.encoder.layer[0].intermediate.dense.weight.mul_(1e5)
    for encode in (lambda e: e.passages(tokens), lambda e: e.queries(["ban"])):
        with pytest.raises(UserError, match=r"embed\.precision: this encoder's numbers are too large for float16"):
            encode(TextEncoder(model, precision="fp16"))
