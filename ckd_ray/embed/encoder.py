"""Encode ragged passages in batches of equal work. Pure torch, no Ray.

Shapes: N passages, L rows of the longest in a batch, T kept tokens, D dimensions.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ckd_ray.model import ColBERT
from ckd_ray.model.tokenizer import Int32Array

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Encoded:
    """Embeddings of some texts: lengths (N,) and token_ids (T,) int32, embeddings_TD float16 on the CPU."""

    lengths: Int32Array
    token_ids: Int32Array
    embeddings_TD: torch.Tensor


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


class TextEncoder:
    """A ColBERT model ready to encode.

    Args:
        model: moved to `device` and put into evaluation mode.
        token_budget: padded tokens a batch; bounds the activations' memory.
        precision: `fp32`, or `bf16` (autocast).
    """

    def __init__(
        self,
        model: ColBERT,
        *,
        device: torch.device | str = "cpu",
        token_budget: int = 16384,
        precision: Precision = "fp32",
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.dim = model.settings.dim
        self.token_budget = token_budget
        self.precision: Precision = precision

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
        out = torch.empty(int(offsets[-1]), self.model.settings.dim, dtype=torch.float16)
        multiple = 8 if self.device.type == "cuda" else 1
        for batch in token_budget_batches(sizes, self.token_budget, multiple):
            ids_NL, mask_NL = tokenizer.pad([tokens[i] for i in batch], multiple)
            with computing(self.device, self.precision):
                rows_NLD, keep_NL = self.model.encode_passages(ids_NL.to(self.device), mask_NL.to(self.device))
            rows_TD = rows_NLD[keep_NL].to("cpu", torch.float16)
            where = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in batch])
            out[torch.from_numpy(where)] = rows_TD
        return Encoded(np.diff(offsets).astype(np.int32), flat[keep], out)

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


def choose_precision(
    model: ColBERT, requested: str, device: torch.device | str = "cpu", threads: int | None = None
) -> tuple[Precision, str]:
    """`fp32` or `bf16` and the reason, for a log line.

    `auto` takes bf16 on a GPU that computes it, and on a CPU only where one measured batch is at least 1.2 times faster
    (AVX512-BF16 and AMX machines; elsewhere bf16 is emulated and slower).
    """
    device = torch.device(device)
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
def _seconds_a_batch(model: ColBERT, precision: Precision) -> float:
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
