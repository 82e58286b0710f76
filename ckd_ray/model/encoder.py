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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, cast, get_args

import numpy as np
import torch

from ckd_ray.errors import UserError, first_line
from ckd_ray.model import ColBERT
from ckd_ray.model.length_buckets import default_token_budget, each_batch, ranges
from ckd_ray.model.linears import fuse_linears, quantise_linears
from ckd_ray.model.pooled import PooledModel
from ckd_ray.model.tokenizer import Int32Array

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Model = TypeVar("Model", ColBERT, PooledModel)
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The compute capability (Ampere) from which NVIDIA GPUs compute bfloat16; older ones emulate it, at the rate of float32
# or below.
_BFLOAT16_FROM = (8, 0)
# Batches whose rows are copied from a GPU while the next ones are computed.
_COPIES = 2


@dataclass(frozen=True)
class Encoded:
    """Embeddings of some texts: lengths (N,) and token_ids (T,) int32, embeddings_TD float16 on the CPU."""

    lengths: Int32Array
    token_ids: Int32Array
    embeddings_TD: torch.Tensor


def computing(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 for the precision `bf16`, to float16 for `fp16`, else nothing."""
    half = _HALVES.get(precision)
    return torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)


class _Encoder(Generic[Model]):
    """A model ready to encode.

    Args:
        model: moved to `device` and put into evaluation mode. On a CPU the encoder works on a copy with faster linear
            layers that cannot be trained (linears.py), on a GPU in 16 bits on a copy with such weights.
        token_budget: padded tokens a batch; bounds the activations' memory. `auto`: see `default_token_budget`.
        precision: `fp32`, `bf16` or `fp16` (on a CPU by autocast), or `int8` (linear layers of the backbone, on a CPU).
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
        if self.device.type == "cpu" and precision not in _HALVES:
            self.model = copy.deepcopy(self.model)
            (quantise_linears if precision == "int8" else fuse_linears)(self.model.backbone)
        self._autocast: Precision = precision
        if self.device.type == "cuda" and precision in _HALVES:
            self.model, self._autocast = with_half_weights(self.model, _HALVES[precision]), "fp32"
        self.dim = model.settings.dim
        self.token_budget = default_token_budget(self.device) if token_budget == "auto" else token_budget
        self.precision: Precision = precision
        # Tensor cores need multiples of 8.
        self.multiple = 8 if self.device.type == "cuda" else 1

    def _each_batch(self, sizes: Int32Array, encode: Callable[[Int32Array], None]) -> None:
        """Call `encode` on batches; a budget that a GPU's memory does not hold stays lower afterwards."""
        self.token_budget = each_batch(sizes, self.token_budget, self.multiple, encode)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; a GPU copies it from page-locked memory while this process goes on."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def with_half_weights(model: Model, dtype: torch.dtype) -> Model:
    """A copy for inference with weights of 16 bits. Autocast would cast them again for every batch, and the inputs of
    every layer: half of the kernels that a batch starts. Buffers keep their type, as tables of positions need it."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype)
    return copied


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
        out = _Rows(torch.empty(int(offsets[-1]), self.dim, dtype=torch.float16), self.device, self.precision)

        def encode(batch: Int32Array) -> None:
            ids_NL, mask_NL = tokenizer.pad([tokens[i] for i in batch], self.multiple)
            # The rows to keep are computed here: asking the device for them would make every batch wait for its end.
            kept_T = np.flatnonzero(mask_NL.numpy().astype(bool) & tokenizer.keeps(ids_NL.numpy()))
            # Passages of one length need no mask, and attention is faster without.
            padded = int(sizes[batch].min()) < ids_NL.shape[1]
            with computing(self.device, self._autocast):
                rows_NLD = self.model.rows(self._send(ids_NL), self._send(mask_NL) if padded else None)
            rows_TD = rows_NLD.flatten(0, 1).index_select(0, self._send(torch.from_numpy(kept_T)))
            out.put(rows_TD.to(torch.float16), torch.from_numpy(ranges(offsets[batch], kept[batch])))

        self._each_batch(sizes, encode)
        return Encoded(kept.astype(np.int32), flat[keep], out.finish())

    @torch.inference_mode()
    def queries(self, texts: Sequence[str]) -> Encoded:
        """Encode queries: `query_maxlen` rows each, augmentation included."""
        tokenizer, rows = self.model.tokenizer, self.model.settings.query_maxlen
        ids_BQ, mask_BQ = tokenizer.queries(texts)
        size = max(1, self.token_budget // rows)
        parts = []
        for ids, mask in zip(ids_BQ.split(size), mask_BQ.split(size), strict=True):
            with computing(self.device, self._autocast):
                rows_BQD = self.model.encode_queries(ids.to(self.device), mask.to(self.device))
            parts.append(rows_BQD.to("cpu", torch.float16).flatten(0, 1))
            if self.precision == "fp16" and not parts[-1].isfinite().all():
                raise _overflow()
        empty = torch.empty(0, self.dim, dtype=torch.float16)
        lengths = np.full(len(texts), rows, np.int32)
        return Encoded(lengths, ids_BQ.numpy().astype(np.int32).ravel(), torch.cat([empty, *parts]))


class PooledEncoder(_Encoder[PooledModel]):
    """A pooled encoder ready to encode: one row a text, with the id of the text's first token."""

    @torch.inference_mode()
    def passages(self, tokens: Sequence[Int32Array]) -> Encoded:
        """One unit vector for every tokenised text, passage or query, in their order."""
        sizes = np.array([len(ids) for ids in tokens], np.int32)
        out = _Rows(torch.empty(len(tokens), self.dim, dtype=torch.float16), self.device, self.precision)

        def encode(batch: Int32Array) -> None:
            ids_NL, mask_NL = self.model.tokenizer.pad([tokens[i] for i in batch], self.multiple)
            padded = int(sizes[batch].min()) < ids_NL.shape[1]
            with computing(self.device, self._autocast):
                rows_ND = self.model.vectors(self._send(ids_NL), self._send(mask_NL), padded=padded)
            out.put(rows_ND.to(torch.float16), torch.from_numpy(batch.astype(np.int64)))

        self._each_batch(sizes, encode)
        first = np.array([ids[0] for ids in tokens], np.int32)
        return Encoded(np.ones(len(tokens), np.int32), first, out.finish())

    def queries(self, texts: Sequence[str]) -> Encoded:
        """As `passages`, of texts that are not tokenised yet."""
        return self.passages(self.model.tokenizer.passages(texts))


class _Rows:
    """Rows on the CPU, filled with rows of the device while the device computes the next batch."""

    def __init__(self, rows_TD: torch.Tensor, device: torch.device, precision: Precision) -> None:
        self._rows_TD, self._device, self._precision = rows_TD, device, precision
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._copies: deque[tuple[torch.Tensor, torch.Tensor, Any]] = deque()

    def put(self, rows_TD: torch.Tensor, at_T: torch.Tensor) -> None:
        if self._precision == "fp16":  # added up on the device, where reading it would make every batch wait
            self._finite = self._finite & rows_TD.isfinite().all()
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
        """Wait until at most `running` copies are left; the rows.

        Raises:
            UserError: all copies are there, and float16 overflowed.
        """
        while len(self._copies) > running:
            host_TD, at_T, copied = self._copies.popleft()
            copied.synchronize()
            self._rows_TD[at_T] = host_TD
        if not running and self._precision == "fp16" and not bool(self._finite):
            raise _overflow()
        return self._rows_TD


def _overflow() -> UserError:
    return UserError(
        "this encoder's numbers are too large for float16",
        where="embed.precision",
        expected="bf16 or fp32",
        found="fp16",
        fix="--set embed.precision=fp32 (or bf16, where the GPU computes it)",
    )


def choose_precision(
    model: ColBERT | PooledModel, requested: str, device: torch.device | str = "cpu", threads: int | None = None
) -> tuple[Precision, str]:
    """`fp32`, `bf16`, `fp16` or `int8` and the reason, for a log line.

    `auto` chooses bf16 on a GPU that computes it (`precision_of_gpus`), and on a CPU only where one measured batch is
    at least 1.2 times faster (AMX machines; elsewhere bf16 is emulated, or its conversions eat the gain). `auto` never
    chooses int8, which changes the ranking a little.

    Raises:
        UserError: int8 on a GPU, fp16 on a CPU, or bf16 of an encoder that fails in it.
    """
    device = torch.device(device)
    chosen: tuple[Precision, str] | None = None
    if (given := configured_precision(requested, device.type)) is not None:
        chosen = given, "as configured"
    elif device.type == "cuda":
        chosen = precision_of_gpus({torch.cuda.get_device_name(device): torch.cuda.get_device_capability(device)})
    if chosen is not None and chosen[0] != "bf16":
        return chosen
    if failure := bf16_failure(model):
        if requested == "auto":
            return "fp32", f"the encoder fails in bfloat16: {failure}"
        kind = type(model.backbone).__name__
        raise UserError(f"{kind} fails in bfloat16", where="precision", expected="fp32", found=f"bf16: {failure}")
    if chosen is not None:
        return chosen
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        fp32, bf16 = _seconds_a_batch(model, "fp32"), _seconds_a_batch(model, "bf16")
    finally:
        torch.set_num_threads(before)
    faster = fp32 / bf16
    return ("bf16" if faster >= 1.2 else "fp32"), f"measured here: bf16 at {faster:.2f} x the rate of fp32"


def configured_precision(requested: str, device: str, key: str = "embed.precision") -> Precision | None:
    """The precision that is asked for; None for `auto`.

    Raises:
        UserError: the device (`cpu` or `cuda`) does not compute it, or too slowly.
    """
    if requested == "int8" and device != "cpu":
        raise UserError("int8 is for CPUs", where=key, expected="auto, bf16, fp16 or fp32 on a GPU", found=requested)
    if requested == "fp16" and device == "cpu":
        raise UserError("fp16 is for GPUs", where=key, expected="auto, bf16 or fp32 on a CPU", found=requested)
    return cast(Precision, requested) if requested in get_args(Precision) else None


def precision_of_gpus(capabilities: Mapping[str, tuple[int, int]]) -> tuple[Precision, str]:
    """What `auto` is on GPUs of these names and compute capabilities: bf16 where all of them compute it, else fp32."""
    slow = sorted(name for name, capability in capabilities.items() if capability < _BFLOAT16_FROM)
    if slow:
        return "fp32", f"{', '.join(slow)} would only emulate bfloat16"
    return "bf16", f"{', '.join(sorted(capabilities))} computes bfloat16"


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
    """Processor time of one batch of 8 passages, the best of three: other work on the machine does not count."""
    width = min(model.settings.doc_maxlen, 128)
    ids = torch.randint(0, model.backbone.config.vocab_size, (8, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    model = model.eval()
    best = float("inf")
    for _ in range(4):  # the first run warms up the kernels
        start = time.process_time()
        with computing(torch.device("cpu"), precision):
            model.encode_passages(ids, mask)
        best = min(best, time.process_time() - start)
    return best
