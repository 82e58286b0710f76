"""Encode ragged passages in batches of equal work. Pure torch, no Ray.

What bounds the memory: a batch's activations grow with `token_budget` and nothing else; the result of one call is that
of one shard (`passages_per_shard`), T rows of D float16 numbers.
Shapes: N passages, L rows of the longest in a batch, T kept tokens, D dimensions.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT
from ckd_ray.model.pooled import PooledModel
from ckd_ray.model.tokenizer import Int32Array

Precision = Literal["fp32", "bf16", "int8"]
Model = TypeVar("Model", ColBERT, PooledModel)
# Batches whose rows are on their way from a GPU while the next ones are computed.
_UNDER_WAY = 2


@dataclass(frozen=True)
class Encoded:
    """Embeddings of some texts: lengths (N,) and token_ids (T,) int32, embeddings_TD float16 on the CPU."""

    lengths: Int32Array
    token_ids: Int32Array
    embeddings_TD: torch.Tensor


def default_token_budget(device: torch.device) -> int:
    """Padded tokens a batch. On a CPU few, so that a layer finds in the cache what the one before has left: MiniLM took
    30.7 ms a passage with 1,440 tokens and 36.9 ms with 8,192 (docs/log.md). A GPU wants many."""
    return 1440 if device.type == "cpu" else 8192


def token_budget_batches(lengths: Int32Array, budget: int, multiple: int = 1) -> Iterator[Int32Array]:
    """Indices of passages, shortest first, in batches whose padded size stays within `budget` tokens.

    Neighbours in length share a batch, so padding is next to nothing whatever the order of the corpus. A passage
    longer than the budget is a batch of its own.
    """
    order = np.argsort(lengths, kind="stable").astype(np.int32)
    widths = -(-np.maximum(lengths[order], 1) // multiple) * multiple
    start = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or int(widths[i]) * (i + 1 - start) > budget:
            yield order[start:i]
            start = i


@contextlib.contextmanager
def computing(device: torch.device, precision: Precision) -> Iterator[None]:
    """Autocast to bfloat16 when `precision` says so; a no-op for fp32."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


class _Encoder(Generic[Model]):
    """A model ready to encode.

    Args:
        model: moved to `device` and put into evaluation mode. On a CPU a copy is taken, whose linear layers are
            replaced by faster ones that cannot be trained (`fused.py`, `int8.py`).
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
            from ckd_ray.model.fused import fuse_linears
            from ckd_ray.model.int8 import quantise_linears

            self.model = copy.deepcopy(self.model)
            (quantise_linears if precision == "int8" else fuse_linears)(self.model.backbone)
        self.dim = model.settings.dim
        self.token_budget = default_token_budget(self.device) if token_budget == "auto" else token_budget
        self.precision: Precision = precision
        # Tensor cores want multiples of 8; a CPU multiplies what it is given.
        self.multiple = 8 if self.device.type == "cuda" else 1

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device without waiting: from page-locked memory when that is a GPU."""
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


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
        landing = _Landing(torch.empty(int(offsets[-1]), self.dim, dtype=torch.float16), self.device)
        for batch in token_budget_batches(sizes, self.token_budget, self.multiple):
            ids_NL, mask_NL = tokenizer.pad([tokens[i] for i in batch], self.multiple)
            # Which rows stay is known here: asking the device for it would make every batch wait for its end.
            kept_T = np.flatnonzero(mask_NL.numpy().astype(bool) & tokenizer.keeps(ids_NL.numpy()))
            rows_NLD = self._rows(ids_NL, mask_NL, padded=int(sizes[batch].min()) < ids_NL.shape[1])
            rows_TD = rows_NLD.flatten(0, 1).index_select(0, self._send(torch.from_numpy(kept_T)))
            landing.add(rows_TD.to(torch.float16), torch.from_numpy(_ranges(offsets[batch], kept[batch])))
        return Encoded(kept.astype(np.int32), flat[keep], landing.finish())

    def _rows(self, ids_NL: torch.Tensor, mask_NL: torch.Tensor, *, padded: bool) -> torch.Tensor:
        """Unit rows (N, L, D) on the device. Passages of one length need no mask, and attention is faster without."""
        with computing(self.device, self.precision):
            return self.model.rows(self._send(ids_NL), self._send(mask_NL) if padded else None)

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
        empty = torch.empty(0, self.model.settings.dim, dtype=torch.float16)
        lengths = np.full(len(texts), rows, np.int32)
        return Encoded(lengths, ids_BQ.numpy().astype(np.int32).ravel(), torch.cat([empty, *parts]))


class PooledEncoder(_Encoder[PooledModel]):
    """An encoder as it is, ready to encode: one row a text, whose token id is that of its first token."""

    @torch.inference_mode()
    def passages(self, tokens: Sequence[Int32Array]) -> Encoded:
        """One unit vector for every tokenised text, passage or query, in their order."""
        sizes = np.array([len(ids) for ids in tokens], np.int32)
        landing = _Landing(torch.empty(len(tokens), self.dim, dtype=torch.float16), self.device)
        for batch in token_budget_batches(sizes, self.token_budget, self.multiple):
            ids_NL, mask_NL = self.model.tokenizer.pad([tokens[i] for i in batch], self.multiple)
            padded = int(sizes[batch].min()) < ids_NL.shape[1]
            with computing(self.device, self.precision):
                rows_ND = self.model.vectors(self._send(ids_NL), self._send(mask_NL), padded=padded)
            landing.add(rows_ND.to(torch.float16), torch.from_numpy(batch.astype(np.int64)))
        first = np.array([ids[0] for ids in tokens], np.int32)
        return Encoded(np.ones(len(tokens), np.int32), first, landing.finish())

    def queries(self, texts: Sequence[str]) -> Encoded:
        """The same for texts that are not tokenised yet."""
        return self.passages(self.model.tokenizer.passages(texts))


class _Landing:
    """Rows on their way from the device to their place in `out_TD`, while the device goes on with the next batch."""

    def __init__(self, out_TD: torch.Tensor, device: torch.device) -> None:
        self._out_TD, self._device = out_TD, device
        self._flying: deque[tuple[torch.Tensor, torch.Tensor, Any]] = deque()

    def add(self, rows_TD: torch.Tensor, where_T: torch.Tensor) -> None:
        if self._device.type != "cuda":
            self._out_TD[where_T] = rows_TD
            return
        host_TD = torch.empty(rows_TD.shape, dtype=rows_TD.dtype, pin_memory=True)
        host_TD.copy_(rows_TD, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._flying.append((host_TD, where_T, arrived))
        if len(self._flying) > _UNDER_WAY:
            self._land()

    def _land(self) -> None:
        host_TD, where_T, arrived = self._flying.popleft()
        arrived.synchronize()
        self._out_TD[where_T] = host_TD

    def finish(self) -> torch.Tensor:
        while self._flying:
            self._land()
        return self._out_TD


def _ranges(starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The numbers starts[i], starts[i] + 1, ... of which there are counts[i], one range after the other."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - ends + counts, counts)


def choose_precision(
    model: ColBERT | PooledModel, requested: str, device: torch.device | str = "cpu", threads: int | None = None
) -> tuple[Precision, str]:
    """`fp32`, `bf16` or `int8` and the reason, for a log line.

    `auto` takes bf16 on a GPU that computes it, and on a CPU only where one measured batch is at least 1.2 times faster
    (AMX machines; elsewhere bf16 is emulated, or its conversions eat the gain). `int8` is taken only when asked for: it
    changes the ranking a little.

    Raises:
        UserError: int8 on a GPU.
    """
    device = torch.device(device)
    if requested == "int8" and device.type != "cpu":
        raise UserError(
            "int8 is for CPUs", where="embed.precision", expected="auto, bf16 or fp32 on a GPU", found=requested
        )
    if requested == "int8":
        return "int8", "as configured"
    if requested in ("fp32", "bf16"):
        return ("bf16" if requested == "bf16" else "fp32"), "as configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU computes bfloat16"
        return "fp32", "the GPU does not compute bfloat16"
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        fp32, bf16 = _seconds_a_batch(model, "fp32"), _seconds_a_batch(model, "bf16")
    finally:
        torch.set_num_threads(before)
    ratio = fp32 / bf16
    return ("bf16" if ratio >= 1.2 else "fp32"), f"measured here: bf16 at {ratio:.2f} x the rate of fp32"


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
