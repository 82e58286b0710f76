"""Texts without padding between them have the rows, and give the gradients, of texts that are padded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.packed import can_pack, encode_packed
from ckd_ray.model.recompute import recompute_activations

SETTINGS = ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)
QUERIES = ["which word", "what of the third word and of the fourth", "w"]
# Groups as a reader makes them: like lengths together, shortest first; equal ones beside one another.
GROUPS = [
    ["a", "b", "one two three"],
    ["four five six seven eight nine ten . ,"],
    [f"word {i} " * 30 for i in range(3)],
]


def inputs(model: ColBERT) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    tokenizer = model.tokenizer
    return *tokenizer.queries(QUERIES), [tokenizer.pad(tokenizer.passages(group)) for group in GROUPS]


def gradients(model: ColBERT, queries: torch.Tensor, groups: list[tuple[torch.Tensor, torch.Tensor]]) -> list:
    """Of a sum in which every row that means something has a weight of its own."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    total = (queries * torch.randn(queries.shape, generator=generator)).sum()
    for rows, keep in groups:
        total = total + (rows * keep[:, :, None] * torch.randn(rows.shape, generator=generator)).sum()
    total.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("packed", [True, False])
def test_activations_that_are_computed_again_give_the_same_gradients(
    tiny_backbone: str, packed: bool, dropout: float
) -> None:
    """The second computation has the attention and the dropout of the first; the first keeps far less."""
    found, kept = [], []
    for again in (False, True):
        model = ColBERT.from_backbone(tiny_backbone, SETTINGS, seed=1, dropout=dropout).train()
        if again:
            recompute_activations(model)
        query_ids, query_mask, groups = inputs(model)
        torch.manual_seed(5)
        saved: list[int] = []

        def keep(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if packed:
                assert can_pack(model)
                encoded = encode_packed(model, query_ids, query_mask, groups)
            else:
                queries = model.encode_queries(query_ids, query_mask)
                encoded = queries, [model.encode_passages(*group) for group in groups]
        found.append(gradients(model, *encoded))
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 2
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("expansion", ["always", "training", "never"])
def test_rows_and_gradients_are_those_of_padded_texts(tiny_backbone: str, expansion: str) -> None:
    settings = replace(SETTINGS, query_expansion=expansion == "always", training_expansion=expansion == "training")
    model = ColBERT.from_backbone(tiny_backbone, settings, seed=1).train()
    assert can_pack(model)
    query_ids, query_mask, groups = inputs(model)
    queries = model.encode_queries(query_ids, query_mask)
    assert bool(queries[~query_mask.bool()].any()) == (expansion != "never")
    padded = [model.encode_passages(*group) for group in groups]
    wanted = gradients(model, queries, padded)
    before = model.backbone.config._attn_implementation
    packed_queries, packed = encode_packed(model, query_ids, query_mask, groups)
    assert model.backbone.config._attn_implementation == before
    found = gradients(model, packed_queries, packed)
    assert torch.allclose(packed_queries, queries, atol=2e-6)
    for (rows, keep), (others, other_keep), (_, mask) in zip(packed, padded, groups, strict=True):
        assert torch.equal(keep, other_keep) and not rows[~mask.bool()].any()
        assert torch.allclose(rows[keep], others[keep], atol=2e-6)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * max(1.0, float(b.abs().max())))


def test_texts_look_at_themselves_alone(tiny_backbone: str) -> None:
    """A passage has the same rows whatever is packed beside it, in whatever place."""
    model = ColBERT.from_backbone(tiny_backbone, SETTINGS, seed=1)
    query_ids, query_mask, groups = inputs(model)
    _, together = encode_packed(model, query_ids, query_mask, groups)
    _, alone = encode_packed(model, query_ids[:0], query_mask[:0], [groups[1]])
    assert torch.allclose(together[1][0], alone[0][0], atol=2e-6)


def test_dropout_of_attention_is_at_work(tiny_backbone: str) -> None:
    model = ColBERT.from_backbone(tiny_backbone, SETTINGS, seed=1, dropout=0.5).train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(encode_packed(model, *inputs(model))[0])
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=1e-3)


def test_an_encoder_that_is_not_known_is_padded(tiny_backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ColBERT.from_backbone(tiny_backbone, SETTINGS, seed=1)
    monkeypatch.setattr(model.backbone.config, "position_embedding_type", "relative_key", raising=False)
    assert not can_pack(model)
