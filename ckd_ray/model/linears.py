"""Faster linear layers for the encoder on a CPU, in float32 or in 8 bits. For inference: they have no gradient.

Float32: weights in oneDNN's own order, and the activation in the same kernel. PyTorch's `addmm` first copies the bias
into its result, and GELU reads and writes the widest activations once more; both together take a fifth of MiniLM's
time. The kernels are those that `torch.compile` would choose, without a compiler.

8 bits: weights are rounded by output channel, activations by token, and sums have 32 bits. Every token has its own
scale, so its codes do not depend on its neighbours in the batch, and integer sums have no order: the products are the
same bit for bit however the corpus is cut.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

# Rows that float32 weights are laid out for; any number may be multiplied.
_ROWS = 4096
_LARGEST = 127.0
# (layer, activation) by their names in a block: BERT and its like, DistilBERT.
_PAIRS = (("dense", "intermediate_act_fn"), ("lin1", "activation"))


class FusedLinear(nn.Module):
    """Replaces a float32 `nn.Linear` on a CPU.

    Args:
        activation: of the result: `none`, or `gelu` (the exact one).
    """

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        self.in_features, self.out_features, self.activation = linear.in_features, linear.out_features, activation
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.bias_O = None if linear.bias is None else linear.bias.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., I) to (..., O), float32."""
        rows_TI = inputs.reshape(-1, self.in_features)
        kind = "none" if self.activation == "gelu" else ""
        out_TO = torch.ops.mkldnn._linear_pointwise(rows_TI, self.packed, self.bias_O, self.activation, [], kind)
        return out_TO.view(*inputs.shape[:-1], self.out_features)


class Int8Linear(nn.Module):
    """Replaces a float `nn.Linear`; each output channel of its weights has its own scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight_OI = linear.weight.detach().float()
        scale_O = (weight_OI.abs().amax(1) / _LARGEST).clamp(min=1e-12)
        codes_OI = (weight_OI / scale_O[:, None]).round().to(torch.int8)
        self.codes_IO: Tensor
        self.scale_O: Tensor
        self.bias_O: Tensor | None
        self.register_buffer("codes_IO", codes_OI.t().contiguous())
        self.register_buffer("scale_O", scale_O)
        self.register_buffer("bias_O", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., I) float to (..., O) float32."""
        rows_TI = inputs.reshape(-1, self.in_features).float()
        largest_T1 = torch.maximum(rows_TI.amax(1, keepdim=True), -rows_TI.amin(1, keepdim=True)).clamp_(min=1e-12)
        codes_TI = (rows_TI * (_LARGEST / largest_T1)).round_().to(torch.int8)
        sums_TO = torch._int_mm(codes_TI, self.codes_IO).float()
        sums_TO.mul_(largest_T1 / _LARGEST)
        bias_O = self.bias_O
        out_TO = sums_TO.mul_(self.scale_O) if bias_O is None else torch.addcmul(bias_O, sums_TO, self.scale_O)
        return out_TO.view(*inputs.shape[:-1], self.out_features)


def fuse_linears(module: nn.Module) -> int:
    """Replace every float32 `nn.Linear` below `module`, in place, together with an exact GELU behind it.

    Returns:
        how many; 0 where this PyTorch has no such kernels, and nothing is changed.
    """
    if not _fused_kernels_work():
        return 0
    count = 0
    for parent in list(module.modules()):
        for layer, activation in _PAIRS:
            linear = getattr(parent, layer, None)
            if _is_plain(linear) and _is_exact_gelu(getattr(parent, activation, None)):
                setattr(parent, layer, FusedLinear(linear, "gelu"))
                setattr(parent, activation, nn.Identity())
                count += 1
    return count + _replace_linears(module, lambda linear: FusedLinear(linear) if _is_plain(linear) else None)


def quantise_linears(module: nn.Module) -> int:
    """Replace every `nn.Linear` below `module`, in place, by its 8-bit form; returns how many there were."""
    return _replace_linears(module, Int8Linear)


def _replace_linears(module: nn.Module, make: Callable[[nn.Linear], nn.Module | None]) -> int:
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            made = make(child) if type(child) is nn.Linear else None
            if made is not None:
                setattr(parent, name, made)
                count += 1
    return count


def _is_plain(child: Any) -> TypeGuard[nn.Linear]:
    return type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu"


def _is_exact_gelu(activation: Any) -> bool:
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    return getattr(activation, "act", None) is nn.functional.gelu  # transformers' GELUActivation


def _fused_kernels_work() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    linear, rows = nn.Linear(8, 8), torch.linspace(-3, 3, 16).view(2, 8)
    try:
        with torch.inference_mode():
            found, expected = FusedLinear(linear, "gelu")(rows), nn.functional.gelu(linear(rows))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool(torch.allclose(found, expected, atol=1e-5))
