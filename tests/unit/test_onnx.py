"""The export as an ONNX graph, run by the code that its model card gives."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ModernBertConfig, ModernBertModel

from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT, ColBERTSettings, maxsim
from ckd_ray.model.colbert import read_tokenizer
from ckd_ray.model.exchange import onnx_graph, write_export
from ckd_ray.pipeline.card import Facts, model_card
from tests.support import WORDS

SETTINGS = ColBERTSettings(dim=16, query_maxlen=8, doc_maxlen=12)
QUERIES = [" ".join(WORDS[:2]) + " ?", WORDS[5], " ".join(WORDS[:30])]
PASSAGES = [f"{WORDS[0]} , {WORDS[1]} .", " ".join(WORDS[:40]), "! ? .", WORDS[5]]


def needs_onnx() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")


def cosine_scores(model: ColBERT) -> np.ndarray:
    """(queries, passages) MaxSim, by the model itself."""
    with torch.no_grad():
        queries = model.encode_queries(*model.tokenizer.queries(QUERIES))
        passages, keep = model.encode_passages(*model.tokenizer.pad(model.tokenizer.passages(PASSAGES)))
    return maxsim(queries, passages, keep, similarity="cosine").numpy()


def scores_by_the_card(model: ColBERT, folder: Path) -> np.ndarray:
    """(queries, passages) MaxSim, by the code of the model card alone."""
    card = model_card(model.settings, Facts(name="mine"), "onnx")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    names: dict = {}
    exec(code[1].replace("FOLDER", str(folder)), names)
    encode = names["encode"]
    assert float(names["score"]) == pytest.approx(
        float((encode("a question", "query") @ encode("a passage", "passage").T).max(1).sum())
    )
    passages = [encode(text, "passage") for text in PASSAGES]
    return np.array([[(encode(q, "query") @ p.T).max(1).sum() for p in passages] for q in QUERIES])


@pytest.fixture(scope="module")
def exported(tiny_backbone: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[ColBERT, Path]:
    """A model and its export; to make a graph takes seconds, and the graph is the same for all settings."""
    needs_onnx()
    folder, model = tmp_path_factory.mktemp("onnx"), ColBERT.from_backbone(tiny_backbone, SETTINGS, seed=3).eval()
    assert write_export(model, folder, "onnx") == []
    return model, folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attend_to_mask": True, "mask_punctuation": False},
        {"query_expansion": False, "query_marker": "", "doc_marker": ""},
    ],
    ids=["default", "attending", "plain"],
)
def test_the_code_of_the_card_scores_as_the_model(
    changes: dict, exported: tuple[ColBERT, Path], tmp_path: Path
) -> None:
    made, export = exported
    settings = ColBERTSettings.from_dict({**SETTINGS.to_dict(), **changes})
    model = ColBERT.from_parts(made.backbone, made.tokenizer.hf, settings, made.projection.weight, where="test").eval()
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    (folder / onnx_graph.ENCODING).write_text(json.dumps(onnx_graph._encoding(model)))
    np.testing.assert_allclose(scores_by_the_card(model, folder), cosine_scores(model), atol=1e-4)
    names = {path.name for path in folder.iterdir()}
    assert {"model.onnx", "encoding.json", "tokenizer.json", "ckd_ray_export.json"} <= names


def modern(tiny_backbone: str, window: int) -> ColBERT:
    """A random ModernBERT, most of whose layers see `window` tokens around each."""
    torch.manual_seed(0)
    tokenizer = read_tokenizer(tiny_backbone)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    config = ModernBertConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        local_attention=window,
        bos_token_id=ids["cls_token_id"],
        eos_token_id=ids["sep_token_id"],
        **ids,
    )
    settings = ColBERTSettings(dim=16, query_maxlen=24, doc_maxlen=60)
    return ColBERT(ModernBertModel(config).eval(), tokenizer, settings).eval()


def test_modernbert(tiny_backbone: str, tmp_path: Path) -> None:
    needs_onnx()
    model = modern(tiny_backbone, window=48)
    write_export(model, tmp_path, "onnx")
    np.testing.assert_allclose(scores_by_the_card(model, tmp_path), cosine_scores(model), atol=1e-4)


def test_rows_that_attend_to_nothing_are_refused(tiny_backbone: str, tmp_path: Path) -> None:
    """The augmentation of a short query lies outside the window of 8 tokens: torch and onnxruntime differ there."""
    needs_onnx()
    with pytest.raises(UserError, match="differ from those of the model"):
        write_export(modern(tiny_backbone, window=8), tmp_path, "onnx")


def test_missing_packages_are_named(tiny_backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = ColBERT.from_backbone(tiny_backbone, SETTINGS, seed=3)
    with pytest.raises(UserError, match=r"ckd-ray\[onnx\]"):
        write_export(model, tmp_path, "onnx")


def test_encoding_says_what_the_tokenizer_does(tiny_backbone: str) -> None:
    model = ColBERT.from_backbone(tiny_backbone, SETTINGS, seed=3)
    found, t = json.loads(json.dumps(onnx_graph._encoding(model))), model.tokenizer
    query = {"before": [t.cls_id, t.query_marker_id], "after": [t.sep_id], "maxlen": 8, "fill": t.mask_id}
    assert found["query"] == {**query, "attend_to_fill": False, "skip": []}
    assert found["passage"]["skip"] == t.skip_ids.tolist() and found["passage"]["fill"] is None
