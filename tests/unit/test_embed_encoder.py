"""Batches of equal work, and that an embedding does not depend on the batch it was computed in."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.encoder import PooledEncoder, TextEncoder, choose_precision, with_half_weights
from ckd_ray.model.length_buckets import each_batch, gpu_token_budget, ranges, token_budget_batches
from ckd_ray.model.linears import FusedLinear, Int8Linear, fuse_linears, quantise_linears
from ckd_ray.model.pooled import PooledModel, load_pooled_tokenizer, pool
from tests.support import WORDS

SETTINGS = ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)


@pytest.fixture(scope="module")
def model(tiny_backbone: str) -> ColBERT:
    return ColBERT.from_backbone(tiny_backbone, SETTINGS).eval()


def texts() -> list[str]:
    """Passages of 0 to 60 words, some punctuation, no two alike in order of length."""
    rng = np.random.default_rng(3)
    sizes = rng.permutation(np.arange(0, 60, 2))
    return [" ".join(rng.choice(WORDS, size)) + (" , ." if size % 4 else "") for size in sizes]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 300), max_size=80),
    st.integers(1, 600),
    st.sampled_from([1, 8]),
)
def test_batches_take_every_passage_once_within_the_budget(lengths: list[int], budget: int, multiple: int) -> None:
    sizes = np.array(lengths, np.int32)
    batches = [b.tolist() for b in token_budget_batches(sizes, budget, multiple)]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    widths = [-(-max(1, *(lengths[i] for i in batch), 1) // multiple) * multiple for batch in batches]
    for batch, width in zip(batches, widths, strict=True):
        assert width * len(batch) <= budget or len(batch) == 1
    # Shortest first, and no batch could have taken the next passage as well.
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)
    for batch, after in itertools.pairwise(batches):
        wider = -(-max(1, lengths[after[0]]) // multiple) * multiple
        assert wider * (len(batch) + 1) > budget


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 600), st.integers(60, 300), st.sampled_from([1, 8]))
def test_batches_shrink_until_the_memory_holds_them(lengths: list[int], budget: int, room: int, multiple: int) -> None:
    """`room`: tokens that fit, one text at least."""
    sizes, done, failed = np.array(lengths, np.int32), list[int](), 0

    def compute(batch: Any) -> None:
        nonlocal failed
        width = -(-int(sizes[batch].max()) // multiple) * multiple
        if width * len(batch) > max(room, width):
            failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(batch.tolist())

    left = each_batch(sizes, budget, multiple, compute)
    assert sorted(done) == list(range(len(lengths)))
    assert (left == budget) == (failed == 0) and failed <= 10
    assert each_batch(sizes, left, multiple, compute) <= left


def test_one_text_that_the_memory_does_not_hold_is_an_error() -> None:
    def compute(batch: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        each_batch(np.array([3, 4, 5], np.int32), 100, 1, compute)


def test_an_encoder_goes_on_with_smaller_batches(model: ColBERT, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = model.tokenizer.passages(texts())
    wanted = TextEncoder(model, token_budget=1000).passages(tokens).embeddings_TD.float()
    encoder = TextEncoder(model, token_budget=1000)
    rows = encoder.model.rows

    def small(ids_NL: torch.Tensor, mask_NL: torch.Tensor | None) -> torch.Tensor:
        if ids_NL.numel() > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows(ids_NL, mask_NL)

    monkeypatch.setattr(encoder.model, "rows", small)
    found = encoder.passages(tokens).embeddings_TD.float()
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
    assert encoder.token_budget <= 200


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=20))
def test_ranges_are_ranges(pairs: list[tuple[int, int]]) -> None:
    literal = [start + i for start, count in pairs for i in range(count)]
    starts, counts = (np.array([p[k] for p in pairs], np.int64) for k in (0, 1))
    assert ranges(starts, counts).tolist() == literal


@pytest.mark.parametrize("budget", [16, 64, 1000, 100_000])
def test_rows_are_those_of_each_passage_alone(model: ColBERT, budget: int) -> None:
    tokens = model.tokenizer.passages(texts())
    encoded = TextEncoder(model, token_budget=budget).passages(tokens)
    row = 0
    for ids, length in zip(tokens, encoded.lengths.tolist(), strict=True):
        keep = model.tokenizer.keeps(ids)
        with torch.inference_mode():
            alone_LD = model.rows(torch.from_numpy(ids.astype(np.int64))[None], None)[0][torch.from_numpy(keep)]
        assert length == int(keep.sum())
        assert encoded.token_ids[row : row + length].tolist() == ids[keep].tolist()
        torch.testing.assert_close(encoded.embeddings_TD[row : row + length].float(), alone_LD, atol=1e-3, rtol=0)
        row += length
    assert row == len(encoded.embeddings_TD) == len(encoded.token_ids)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_fused_layers_compute_what_the_plain_ones_do(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

    torch.manual_seed(1)
    if kind == "bert":
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        plain: torch.nn.Module = BertModel(BertConfig(vocab_size=50, initializer_range=0.5, **shape)).eval()
        per_layer = 6
    else:
        small = DistilBertConfig(vocab_size=50, dim=32, hidden_dim=64, n_layers=2, n_heads=2, initializer_range=0.5)
        plain, per_layer = DistilBertModel(small).eval(), 6
    fused = copy.deepcopy(plain)
    count = fuse_linears(fused)
    assert count == 2 * per_layer + (kind == "bert")  # and BERT's pooler
    assert sum(isinstance(m, FusedLinear) and m.activation == "gelu" for m in fused.modules()) == 2
    ids = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.inference_mode():
        wanted, found = (m(ids, attention_mask=mask).last_hidden_state for m in (plain, fused))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    assert fuse_linears(fused) == 0  # nothing is left to fuse
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fuse_linears(plain) == 0 and not any(isinstance(m, FusedLinear) for m in plain.modules())


def test_nothing_to_encode(model: ColBERT) -> None:
    encoded = TextEncoder(model).passages([])
    assert encoded.embeddings_TD.shape == (0, 16) and len(encoded.lengths) == 0


def test_int8_rounds_weights_by_channel_and_activations_by_token() -> None:
    linear = torch.nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.27, -0.5, 0.0, 0.0], [0.0, 0.0, 254.0, -2.0]]))
        linear.bias.copy_(torch.tensor([10.0, -1.0]))
    small = Int8Linear(linear)
    assert small.codes_IO.tolist() == [[127, 0], [-50, 0], [0, 127], [0, -1]]
    # Largest 2.0: codes 127, 64 (63.5 to even), 0, -127 (scale 2 / 127).
    got = small(torch.tensor([[2.0, 1.0, 0.0, -2.0], [0.0, 0.0, 0.0, 0.0]]))
    first = 2 / 127 * torch.tensor([(127 * 127 - 50 * 64) * 0.01, 127 * 2.0]) + linear.bias
    torch.testing.assert_close(got, torch.stack([first, linear.bias]).detach(), atol=1e-5, rtol=1e-6)


def test_int8_does_not_depend_on_the_batch(model: ColBERT, tiny_backbone: str) -> None:
    """The same token ids and lengths among other neighbours: the same bits; and near to the float model."""
    other = ColBERT.from_backbone(tiny_backbone, SETTINGS).eval()
    tokens = [ids for ids in model.tokenizer.passages(texts()) if len(ids) > 3]
    encoder = TextEncoder(other, token_budget=10_000, precision="int8")
    layer = Int8Linear(torch.nn.Linear(32, 8))
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(rows)[20:30], layer(rows[20:30]))
    exact = TextEncoder(model).passages(tokens).embeddings_TD.float()
    rough = encoder.passages(tokens).embeddings_TD.float()
    cosine = (exact * rough).sum(-1)
    assert 0.99 < float(cosine.mean()) < 1 - 1e-6 and float(cosine.min()) > 0.9
    assert quantise_linears(encoder.model.backbone) == 0  # all twelve are replaced already


def test_int8_is_opt_in_and_for_cpus(model: ColBERT) -> None:
    assert choose_precision(model, "int8")[0] == "int8"
    assert choose_precision(model, "auto")[0] != "int8"
    with pytest.raises(UserError, match=r"embed\.precision"):
        choose_precision(model, "int8", "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_compute_as_well_as_autocast(model: ColBERT, dtype: torch.dtype) -> None:
    """What a GPU does: weights are cast once, and buffers not at all."""
    model.register_buffer("table", torch.linspace(0, 1, 7), persistent=False)
    ids_NL, mask_NL = model.tokenizer.pad(model.tokenizer.passages(texts()))
    cast = with_half_weights(model, dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert cast.table.dtype == torch.float32
    with torch.inference_mode():
        exact, found = (m.rows(ids_NL, mask_NL)[mask_NL.bool()] for m in (model, cast))
        with torch.autocast("cpu", dtype):
            autocast = model.rows(ids_NL, mask_NL)[mask_NL.bool()]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
    lost, lost_by_autocast = (1 - float((exact * rows).sum(1).mean()) for rows in (found, autocast))
    assert 0 < lost < 3 * lost_by_autocast + 1e-5 and lost < (1e-3 if dtype == torch.bfloat16 else 1e-4)
    del model.table


def test_a_large_gpu_gets_large_batches() -> None:
    found = {gib: gpu_token_budget(gib) for gib in (0.0, 4, 14.6, 22.1, 39.4, 79.2, 139.8)}
    assert list(found.values()) == [8192, 8192, 16384, 32768, 65536, 131072, 131072]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_is_that_of_a_literal_loop(tiny_backbone: str, pooling: str) -> None:
    """One text at a time, without padding: [CLS] text [SEP], its token outputs pooled, a vector of length 1."""
    model = PooledModel.from_backbone(tiny_backbone)
    model.pooling = pooling  # type: ignore[assignment]
    encoded = PooledEncoder(model, token_budget=100).passages(model.tokenizer.passages(texts()))
    assert encoded.lengths.tolist() == [1] * len(texts()) and encoded.embeddings_TD.shape == (len(texts()), 32)
    hf = model.tokenizer.hf
    for text, found in zip(texts(), encoded.embeddings_TD.float(), strict=True):
        ids = [hf.cls_token_id, *hf(text, add_special_tokens=False)["input_ids"], hf.sep_token_id]
        with torch.no_grad():
            rows = [row.tolist() for row in model.backbone(torch.tensor([ids])).last_hidden_state[0]]
        if pooling == "cls":
            rows = rows[:1]
        literal = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        norm = sum(v * v for v in literal) ** 0.5
        assert found.tolist() == pytest.approx([v / norm for v in literal], abs=1e-3)  # rows are kept in fp16


def test_pooling_is_sentence_transformers_formula(tiny_backbone: str) -> None:
    """Its models.Pooling: token outputs times the expanded mask, summed, over the mask's sum, at least 1e-9."""
    model = PooledModel.from_backbone(tiny_backbone)
    ids_NL, mask_NL = model.tokenizer.pad(model.tokenizer.passages([t for t in texts() if t][:6]))
    with torch.no_grad():
        token_embeddings = model.backbone(input_ids=ids_NL, attention_mask=mask_NL).last_hidden_state
        expanded = mask_NL.unsqueeze(-1).expand(token_embeddings.size()).to(token_embeddings.dtype)
        theirs = torch.sum(token_embeddings * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)
        assert torch.allclose(pool(token_embeddings, mask_NL, "mean"), theirs, atol=1e-6)
        assert torch.allclose(model.vectors(ids_NL, mask_NL), torch.nn.functional.normalize(theirs, dim=1), atol=1e-6)


@pytest.mark.parametrize(
    ("modes", "limit", "pooling", "maxlen"),
    [
        (None, None, "mean", 64),  # 256, and the backbone holds 64
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, 48, "cls", 48),
        ({"pooling_mode": "cls"}, 500, "cls", 64),
        ({"pooling_mode_max_tokens": True}, None, "mean", 64),
    ],
)
def test_the_folder_says_how_its_texts_are_pooled(
    tiny_backbone: str, tmp_path: Path, modes: dict | None, limit: int | None, pooling: str, maxlen: int
) -> None:
    folder = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, folder)
    if modes is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    if limit is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit}))
    PooledModel.from_backbone(str(folder)).save(tmp_path / "saved")
    model = PooledModel.from_pretrained(tmp_path / "saved")
    assert (model.pooling, model.settings.doc_maxlen, model.settings.dim) == (pooling, maxlen, 32)
    (long,) = load_pooled_tokenizer(tmp_path / "saved").passages([" ".join(WORDS * 10)])
    assert len(long) == maxlen


def test_a_colbert_model_has_no_pooled_vector(model: ColBERT, tmp_path: Path) -> None:
    model.save(tmp_path / "colbert")
    with pytest.raises(UserError, match=r"late-interaction \(ColBERT\) model \(ckd-ray\)"):
        PooledModel.from_backbone(str(tmp_path / "colbert"))
