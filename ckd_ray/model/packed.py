"""Encoding texts of any lengths in one call without padding.

The rows of all texts are one matrix, so every linear layer is one product; only attention computes the texts one by one
(those of the same length together). For training on CPUs, where products bound a step: at batch 8 one tenth to one
seventh of the rows would be padding, and each group of like length would need its own products, sums and gradients.

Shapes: b queries of Q tokens, groups of g passages of at most L tokens, T rows of all texts, A heads of d numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ckd_ray.model.colbert import ColBERT

_NAME = "ckd_ray_packed"


@dataclass(frozen=True)
class _Run:
    """Consecutive texts of the same length; the tokens they attend to (count, length), None for all of them."""

    count: int
    length: int
    attended: Tensor | None = None


def can_pack(model: ColBERT) -> bool:
    """Whether `encode_packed` knows the encoder: BERT with absolute positions, on a CPU."""
    config = model.backbone.config
    absolute = getattr(config, "position_embedding_type", None) in (None, "absolute")
    return model.device.type == "cpu" and config.model_type == "bert" and absolute and _registered()


def encode_packed(
    model: ColBERT, query_ids_bQ: Tensor, query_mask_bQ: Tensor, groups: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """As `encode_queries`, and `encode_passages` of every group, in one call of the encoder.

    Args:
        groups: (ids_gL, attention mask_gL); padding follows a passage's tokens.

    Returns:
        queries_bQD, and (rows_gLD, keep_gL) of every group; rows of padding are zeros.
    """
    b, q = query_ids_bQ.shape
    # A query has rows for its padding too (augmentation); the mask keeps the other rows from attending to them.
    runs = [_Run(b, q, None if bool(query_mask_bQ.all()) else query_mask_bQ.bool())] if b else []
    ids = [query_ids_bQ.reshape(-1)]
    for ids_gL, mask_gL in groups:
        present_gL = mask_gL.bool()
        ids.append(ids_gL[present_gL])
        lengths, counts = torch.unique_consecutive(present_gL.sum(1), return_counts=True)
        runs += [_Run(n, length) for n, length in zip(counts.tolist(), lengths.tolist(), strict=True)]
    rows_TD = _rows(model, torch.cat(ids), runs)
    packed = rows_TD.split([len(part) for part in ids])
    queries_bQD = packed[0].reshape(b, q, model.settings.dim)
    if not model.expands_queries:
        queries_bQD = queries_bQD * query_mask_bQ[:, :, None]
    found = []
    for rows, (ids_gL, mask_gL) in zip(packed[1:], groups, strict=True):
        rows_gLD = rows.new_zeros(*ids_gL.shape, rows.shape[-1])
        found.append((rows_gLD.index_put((mask_gL.bool(),), rows), model.keep_mask(ids_gL, mask_gL)))
    return queries_bQD, found


def _rows(model: ColBERT, ids_T: Tensor, runs: list[_Run]) -> Tensor:
    """Unit rows (T, D), float32."""
    positions_T = torch.cat([torch.arange(run.length).repeat(run.count) for run in runs])
    with attention(model.backbone.config, _NAME):
        hidden_1TH = model.backbone(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            token_type_ids=torch.zeros_like(ids_T)[None],
            packed_runs=runs,
        ).last_hidden_state
    return F.normalize(model.projection(hidden_1TH[0]).float(), dim=-1)


@contextmanager
def attention(config: Any, name: str) -> Iterator[None]:
    """A context in which the encoder of this configuration has the attention that `transformers` knows as `name`."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    module: Any,
    query_1ATd: Tensor,
    key_1ATd: Tensor,
    value_1ATd: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_runs: list[_Run] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Every text attends to itself. What `transformers` asks of an attention function: returns (1, T, A, d)."""
    assert packed_runs is not None
    sizes = [run.count * run.length for run in packed_runs]
    # Views of one text behind the other; `split` brings all their gradients together in one copy.
    parts = [x.transpose(1, 2)[0].split(sizes) for x in (query_1ATd, key_1ATd, value_1ATd)]
    out = []
    for run, *rows in zip(packed_runs, *parts, strict=True):
        q, k, v = (x.unflatten(0, (run.count, run.length)).transpose(1, 2) for x in rows)
        mask = None if run.attended is None else run.attended[:, None, None, :]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        out.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)[None], None


@cache
def _registered() -> bool:
    """Make the attention known to `transformers`; False where its interface is another (before version 5)."""
    if int(version("transformers").partition(".")[0]) < 5:
        return False
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, lambda **_: None)
    return True
