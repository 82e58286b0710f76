"""Encoding ragged passages in batches of equal work. Pure torch, no Ray.

Memory: the activations of a batch grow with `token_budget` alone, and the result of one call is that of one shard
(`passages_per_shard`), T rows of D float16 numbers.
Shapes: N passages, L rows of the longest in a batch, T kept tokens, D dimensions.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, cast, get_args

import numpy as np
import torch

from ckd_ray.errors import UserError, first_line
from ckd_ray.model import ColBERT
from ckd_ray.model.length_buckets import default_token_budget, ranges, token_budget_batches
from ckd_ray.model.linears import fuse_linears, quantise_linears
from ckd_ray.model.pooled import PooledModel
from ckd_ray.model.tokenizer import Int32Array

Precision = Literal["fp32", "bf16", "int8"]
Model = TypeVar("Model", ColBERT, PooledModel)
# Batches whose rows are copied from a GPU while the next ones are computed.
_COPIES = 2


@dataclass(frozen=True)
class Encoded:
    """Embeddings of some texts: lengths (N,) and token_ids (T,) int32, embeddings_TD float16 on the CPU."""

    lengths: Int32Array
    token_ids: Int32Array
    embeddings_TD: torch.Tensor


def computing(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 for the precision `bf16`, else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class _Encoder(Generic[Model]):
    """A model ready to encode.

    Args:
        model: moved to `device` and put into evaluation mode. On a CPU the encoder works on a copy with faster linear
            layers that cannot be trained (linears.py).
        token_budget: padded tokens a batch; bounds the activations' memory. `auto`: see `default_token_budget`.
        precision: `fp32`, `bf16` (autocast), or `int8` (linear layers of the backbone, on a CPU).
    """

    def __init__(
        self,
        model: Model,
        *,
        device: torch.device | str = "cpu",
        token_budget: int | Literal["auto"] = "auto",
        precision: Precision = "fp32",
    ) -> None:
        self.device = torch.device(device)
        self.model: Model = model.to(self.device).eval()
        if self.device.type == "cpu" and precision != "bf16":
            self.model = copy.deepcopy(self.model)
            (quantise_linears if precision == "int8" else fuse_linears)(self.model.backbone)
        self.dim = model.settings.dim
        self.token_budget = default_token_budget(self.device) if token_budget == "auto" else token_budget
        self.precision: Precision = precision
        # Tensor cores need multiples of 8.
        self.multiple = 8 if self.device.type == "cuda" else 1

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; a GPU copies it from page-locked memory while this process goes on."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


class TextEncoder(_Encoder[ColBERT]):
    """A ColBERT model ready to encode: a row for every kept token."""

    @torch.inference_mode()
    def passages(self, tokens: Sequence[Int32Array]) -> Encoded:
        """Encode tokenised passages (`ColBERTTokenizer.passages`), in their order; punctuation rows are left out."""
        tokenizer = self.model.tokenizer
        sizes = np.array([len(ids) for ids in tokens], np.int32)
        flat = np.concatenate(tokens) if len(tokens) else np.empty(0, np.int32)
        keep = tokenizer.keeps(flat)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        kept_before = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
        offsets = kept_before[starts]
        kept = np.diff(offsets)
        out = _Rows(torch.empty(int(offsets[-1]), self.dim, dtype=torch.float16), self.device)
        for batch in token_budget_batches(sizes, self.token_budget, self.multiple):
            ids_NL, mask_NL = tokenizer.pad([tokens[i] for i in batch], self.multiple)
            # The rows to keep are computed here: asking the device for them would make every batch wait for its end.
            kept_T = np.flatnonzero(mask_NL.numpy().astype(bool) & tokenizer.keeps(ids_NL.numpy()))
            # Passages of one length need no mask, and attention is faster without.
            padded = int(sizes[batch].min()) < ids_NL.shape[1]
            with computing(self.device, self.precision):
                rows_NLD = self.model.rows(self._send(ids_NL), self._send(mask_NL) if padded else None)
            rows_TD = rows_NLD.flatten(0, 1).index_select(0, self._send(torch.from_numpy(kept_T)))
            out.put(rows_TD.to(torch.float16), torch.from_numpy(ranges(offsets[batch], kept[batch])))
        return Encoded(kept.astype(np.int32), flat[keep], out.finish())

    @torch.inference_mode()
    def queries(self, texts: Sequence[str]) -> Encoded:
        """Encode queries: `query_maxlen` rows each, augmentation included."""
        tokenizer, rows = self.model.tokenizer, self.model.settings.query_maxlen
        ids_BQ, mask_BQ = tokenizer.queries(texts)
        size = max(1, self.token_budget // rows)
        parts = []
        for ids, mask in zip(ids_BQ.split(size), mask_BQ.split(size), strict=True):
            with computing(self.device, self.precision):
                rows_BQD = self.model.encode_queries(ids.to(self.device), mask.to(self.device))
            parts.append(rows_BQD.to("cpu", torch.float16).flatten(0, 1))
        empty = torch.empty(0, self.dim, dtype=torch.float16)
        lengths = np.full(len(texts), rows, np.int32)
        return Encoded(lengths, ids_BQ.numpy().astype(np.int32).ravel(), torch.cat([empty, *parts]))


class PooledEncoder(_Encoder[PooledModel]):
    """A pooled encoder ready to encode: one row a text, with the id of the text's first token."""

    @torch.inference_mode()
    def passages(self, tokens: Sequence[Int32Array]) -> Encoded:
        """One unit vector for every tokenised text, passage or query, in their order."""
        sizes = np.array([len(ids) for ids in tokens], np.int32)
        out = _Rows(torch.empty(len(tokens), self.dim, dtype=torch.float16), self.device)
        for batch in token_budget_batches(sizes, self.token_budget, self.multiple):
            ids_NL, mask_NL = self.model.tokenizer.pad([tokens[i] for i in batch], self.multiple)
            padded = int(sizes[batch].min()) < ids_NL.shape[1]
            with computing(self.device, self.precision):
                rows_ND = self.model.vectors(self._send(ids_NL), self._send(mask_NL), padded=padded)
            out.put(rows_ND.to(torch.float16), torch.from_numpy(batch.astype(np.int64)))
        first = np.array([ids[0] for ids in tokens], np.int32)
        return Encoded(np.ones(len(tokens), np.int32), first, out.finish())

    def queries(self, texts: Sequence[str]) -> Encoded:
        """As `passages`, of texts that are not tokenised yet."""
        return self.passages(self.model.tokenizer.passages(texts))


class _Rows:
    """Rows on the CPU, filled with rows of the device while the device computes the next batch."""

    def __init__(self, rows_TD: torch.Tensor, device: torch.device) -> None:
        self._rows_TD, self._device = rows_TD, device
        self._copies: deque[tuple[torch.Tensor, torch.Tensor, Any]] = deque()

    def put(self, rows_TD: torch.Tensor, at_T: torch.Tensor) -> None:
        if self._device.type != "cuda":
            self._rows_TD[at_T] = rows_TD
            return
        host_TD = torch.empty(rows_TD.shape, dtype=rows_TD.dtype, pin_memory=True)
        host_TD.copy_(rows_TD, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._copies.append((host_TD, at_T, copied))
        self.finish(_COPIES)

    def finish(self, running: int = 0) -> torch.Tensor:
        """Wait until at most `running` copies are left; the rows."""
        while len(self._copies) > running:
            host_TD, at_T, copied = self._copies.popleft()
            copied.synchronize()
            self._rows_TD[at_T] = host_TD
        return self._rows_TD


def choose_precision(
    model: ColBERT | PooledModel, requested: str, device: torch.device | str = "cpu", threads: int | None = None
) -> tuple[Precision, str]:
    """`fp32`, `bf16` or `int8` and the reason, for a log line.

    `auto` chooses bf16 on a GPU that computes it, and on a CPU only where one measured batch is at least 1.2 times
    faster (AMX machines; elsewhere bf16 is emulated, or its conversions eat the gain). `auto` never chooses int8, which
    changes the ranking a little.

    Raises:
        UserError: int8 on a GPU, or bf16 of an encoder that fails in it.
    """
    device = torch.device(device)
    if requested in ("auto", "bf16") and (failure := bf16_failure(model)):
        if requested == "auto":
            return "fp32", f"the encoder fails in bfloat16: {failure}"
        kind = type(model.backbone).__name__
        raise UserError(f"{kind} fails in bfloat16", where="precision", expected="fp32", found=f"bf16: {failure}")
    if requested == "int8" and device.type != "cpu":
        raise UserError(
            "int8 is for CPUs", where="embed.precision", expected="auto, bf16 or fp32 on a GPU", found=requested
        )
    if requested in get_args(Precision):
        return cast(Precision, requested), "as configured"
    if device.type == "cuda":
        computes = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16" if computes else "fp32"), f"the GPU {'computes' if computes else 'does not compute'} bfloat16"
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        fp32, bf16 = _seconds_a_batch(model, "fp32"), _seconds_a_batch(model, "bf16")
    finally:
        torch.set_num_threads(before)
    faster = fp32 / bf16
    return ("bf16" if faster >= 1.2 else "fp32"), f"measured here: bf16 at {faster:.2f} x the rate of fp32"


@torch.inference_mode()
def bf16_failure(model: ColBERT | PooledModel) -> str | None:
    """Why the encoder cannot compute in bfloat16 (DeBERTa's first version masks with float32's lowest number); None
    when it can."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, 4, dtype=torch.int64, device=device)
    try:
        with computing(device, "bf16"):
            model.eval().encode_passages(ids, torch.ones_like(ids))
    except RuntimeError as error:
        return first_line(error)
    return None


@torch.inference_mode()
def _seconds_a_batch(model: ColBERT | PooledModel, precision: Precision) -> float:
    """The best of three encodings of one batch of 8 passages."""
    width = min(model.settings.doc_maxlen, 128)
    ids = torch.randint(0, model.backbone.config.vocab_size, (8, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    model = model.eval()
    best = float("inf")
    for _ in range(4):  # the first run warms up the kernels
        start = time.perf_counter()
        with computing(torch.device("cpu"), precision):
            model.encode_passages(ids, mask)
        best = min(best, time.perf_counter() - start)
    return best
