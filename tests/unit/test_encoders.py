"""Encoder families that the field uses, each as a random tiny one, from loading to a trained and saved model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from ckd_ray.collective.losses import BatchScores, contrastive
from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT, ColBERTSettings, maxsim
from ckd_ray.model.encoder import TextEncoder, bf16_failure, choose_precision
from ckd_ray.model.recompute import recompute_activations
from tests.support import WORDS

SETTINGS = ColBERTSettings(dim=16, query_maxlen=8, doc_maxlen=40)
# Longer than the window of ModernBERT's local attention, and of lengths that need padding.
TEXTS = [WORDS[0], " ".join(WORDS[:36]), f"{WORDS[1]} , {WORDS[2]}", " ".join(WORDS[20:50])]
LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "initializer_range": 0.2}
SIZES = {**LAYERS, "hidden_size": 32, "max_position_embeddings": 64}
APART = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
BERT_ENDS = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
# Name: its class of configurations, its values, and whether its vocabulary is BERT's or RoBERTa's.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertConfig", SIZES, "bert"),
    "modernbert": ("ModernBertConfig", {**SIZES, **BERT_ENDS, "local_attention": 8}, "bert"),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64,
         "initializer_range": 0.2},
        "bert",
    ),
    "electra": ("ElectraConfig", {**SIZES, "embedding_size": 16}, "bert"),
    "albert": ("AlbertConfig", {**SIZES, "embedding_size": 16}, "bert"),
    "mpnet": ("MPNetConfig", {**SIZES, "pad_token_id": 1}, "roberta"),
    "roberta": ("RobertaConfig", {**SIZES, "pad_token_id": 1}, "roberta"),
    "xlm-roberta": ("XLMRobertaConfig", {**SIZES, "pad_token_id": 1}, "roberta"),
    "deberta": ("DebertaConfig", {**SIZES, **APART}, "bert"),
    "deberta-v2": (
        "DebertaV2Config",
        {**SIZES, **APART, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        "bert",
    ),
}  # fmt: skip
WITHOUT_RECOMPUTING = {"albert", "mpnet"}  # transformers has not written it for them


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs with RoBERTa's special tokens, which has no unused ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    names = ["bos_token", "pad_token", "eos_token", "unk_token", "mask_token"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, special, strict=True)))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(family: str, tiny_backbone: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As encoders are published: the weights of a masked language model."""
    path = tmp_path_factory.mktemp(family)
    kind, values, vocabulary = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone) if vocabulary == "bert" else byte_tokenizer()
    torch.manual_seed(1)
    config = getattr(transformers, kind)(vocab_size=len(tokenizer), **values)
    AutoModelForMaskedLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder: str) -> ColBERT:
    return ColBERT.from_backbone(folder, SETTINGS, seed=1).eval()


def encoded(model: ColBERT, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    return model.encode_passages(*model.tokenizer.pad(model.tokenizer.passages(texts)))


@torch.no_grad()
def test_rows_are_those_of_each_text_alone(model: ColBERT) -> None:
    tokens = model.tokenizer.passages(TEXTS)
    assert max(map(len, tokens)) > 30 > min(map(len, tokens))
    together = TextEncoder(model, token_budget=1000).passages(tokens)
    row = 0
    for text, length in zip(TEXTS, together.lengths.tolist(), strict=True):
        rows_1LD, keep_1L = encoded(model, [text])
        found = together.embeddings_TD[row : row + length].float()
        torch.testing.assert_close(found, rows_1LD[keep_1L], atol=2e-3, rtol=0)
        row += length
    assert row == len(together.embeddings_TD)
    # Texts that differ have other rows: attention sees their tokens.
    assert not torch.allclose(encoded(model, [TEXTS[1]])[0][0, 0], encoded(model, [TEXTS[3]])[0][0, 0], atol=0.005)


def test_int8_is_near(model: ColBERT) -> None:
    tokens = model.tokenizer.passages(TEXTS)
    plain, small = (TextEncoder(model, precision=p).passages(tokens).embeddings_TD.float() for p in ("fp32", "int8"))
    assert float((plain * small).sum(1).mean()) > 0.97


def test_bfloat16_is_near_or_refused(family: str, model: ColBERT) -> None:
    if family == "deberta":
        assert "BFloat16" in str(bf16_failure(model))
        assert choose_precision(model, "auto")[0] == "fp32"
        with pytest.raises(UserError, match="DebertaModel fails in bfloat16"):
            choose_precision(model, "bf16")
        return
    assert choose_precision(model, "bf16") == ("bf16", "as configured")
    tokens = model.tokenizer.passages(TEXTS)
    plain, half = (TextEncoder(model, precision=p).passages(tokens).embeddings_TD.float() for p in ("fp32", "bf16"))
    assert float((plain * half).sum(1).mean()) > 0.98


def loss(model: ColBERT) -> torch.Tensor:
    """Of queries that are the first words of their passages."""
    queries = [" ".join(text.split()[:3]) for text in TEXTS]
    queries_BQD = model.encode_queries(*model.tokenizer.queries(queries))
    scores_BN = maxsim(queries_BQD, *model.encode_passages(*model.tokenizer.pad(model.tokenizer.passages(TEXTS))))
    valid_BN = torch.ones_like(scores_BN, dtype=torch.bool)
    scores = BatchScores(scores_BN, torch.arange(len(TEXTS)), valid_BN, list_size=1)
    return contrastive(scores, scale=1.0).loss_B.mean()


def test_it_trains_and_comes_back(model: ColBERT, tmp_path: Path) -> None:
    student = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        now = loss(student)
        now.backward()
        unused = [name for name, parameter in student.named_parameters() if parameter.grad is None]
        assert unused == [], "DDP stops at parameters without a gradient"
        optimizer.step()
        losses.append(float(now.detach()))
    assert losses[-1] < 0.9 * losses[0]
    student.eval().save(tmp_path / "student")
    again = ColBERT.from_pretrained(tmp_path / "student").eval()
    assert again.settings == student.settings
    with torch.no_grad():
        assert torch.equal(encoded(again, TEXTS)[0], encoded(student, TEXTS)[0])
        assert torch.equal(*(m.encode_queries(*m.tokenizer.queries(TEXTS)) for m in (again, student)))


def test_dropout_is_switched_on_and_off(model: ColBERT) -> None:
    noisy = copy.deepcopy(model).train()
    noisy.set_dropout(0.3)
    assert not torch.allclose(encoded(noisy, TEXTS)[0], encoded(noisy, TEXTS)[0], atol=0.01)
    noisy.set_dropout(0.0)
    assert torch.equal(encoded(noisy, TEXTS)[0], encoded(noisy, TEXTS)[0])


def test_activations_computed_again_give_the_same_gradients(family: str, model: ColBERT) -> None:
    plain, again = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    if family in WITHOUT_RECOMPUTING:
        with pytest.raises(
            UserError, match=r"distill\.gradient_checkpointing: this encoder does not support gradient checkpointing"
        ):
            recompute_activations(again, "distill.gradient_checkpointing")
        return
    recompute_activations(again)
    for one in (plain, again):
        loss(one).backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(b.grad, a.grad, atol=1e-6, rtol=1e-4)


def test_positions_that_begin_after_the_padding_leave_less_room(family: str, folder: str) -> None:
    """RoBERTa's 64 positions hold 62 tokens: a longer passage would fail in the middle of the job."""
    if not getattr(AutoModel.from_pretrained(folder).config, "max_position_embeddings", 0):
        pytest.skip("no limit")
    room = 62 if FAMILIES[family][2] == "roberta" else 64
    longest = ColBERT.from_backbone(folder, ColBERTSettings(dim=16, doc_maxlen=room))
    (tokens,) = longest.tokenizer.passages([" ".join(WORDS * 2)])
    assert len(tokens) == room and np.isfinite(TextEncoder(longest).passages([tokens]).embeddings_TD.numpy()).all()
    with pytest.raises(UserError, match=f"holds {room} tokens at most"):
        ColBERT.from_backbone(folder, ColBERTSettings(dim=16, doc_maxlen=room + 1))


def test_generators_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    generator = transformers.GPT2Config(vocab_size=size, n_layer=1, n_head=2, n_embd=32, n_positions=64)
    pair = transformers.T5Config(vocab_size=size, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    for name, config in (("gpt2", generator), ("t5", pair)):
        AutoModel.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match=r"an encoder with a decoder(.|\n)*found: T5Model"):
        ColBERT.from_backbone(str(tmp_path / "t5"), SETTINGS)
    without_mask = byte_tokenizer()
    without_mask.mask_token = None
    without_mask.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"no \[MASK\] token(.|\n)*choose an encoder"):
        ColBERT.from_backbone(str(tmp_path / "gpt2"), SETTINGS)
