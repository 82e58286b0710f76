"""Linear layers of an encoder on a CPU, with weights in oneDNN's own order and the activation in the same kernel.

PyTorch's own `addmm` copies the bias into its result first, and GELU reads and writes the widest activations once more;
together a fifth of MiniLM's time. The kernels are those that `torch.compile` would choose; without a compiler. For
inference alone: they have no gradient. Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ckd_ray.model.linears import replace_linears

# Rows that the weights are laid out for; any number may be multiplied.
_ROWS = 4096
# (layer, activation) by their names in a block: BERT and its like, DistilBERT.
_PAIRS = (("dense", "intermediate_act_fn"), ("lin1", "activation"))


class FusedLinear(nn.Module):
    """Stands in for a float32 `nn.Linear` on a CPU.

    Args:
        activation: `none`, or `gelu` (the exact one) of the result.
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


def fuse_linears(module: nn.Module) -> int:
    """Replace every float32 `nn.Linear` below `module`, in place, with the exact GELU behind it where there is one.
    Returns how many; 0 where this PyTorch has no such kernels, and nothing is changed."""
    if not _works():
        return 0
    count = 0
    for parent in list(module.modules()):
        for layer, activation in _PAIRS:
            linear = getattr(parent, layer, None)
            if _plain(linear) and _exact_gelu(getattr(parent, activation, None)):
                setattr(parent, layer, FusedLinear(linear, "gelu"))
                setattr(parent, activation, nn.Identity())
                count += 1
    return count + replace_linears(module, lambda linear: FusedLinear(linear) if _plain(linear) else None)


def _plain(child: Any) -> TypeGuard[nn.Linear]:
    return type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu"


def _exact_gelu(activation: Any) -> bool:
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    return getattr(activation, "act", None) is nn.functional.gelu  # transformers' GELUActivation


def _works() -> bool:
    """Whether the kernels are there, and compute what they should."""
    if not torch.backends.mkldnn.is_available():
        return False
    linear, rows = nn.Linear(8, 8), torch.linspace(-3, 3, 16).view(2, 8)
    try:
        with torch.inference_mode():
            found, wanted = FusedLinear(linear, "gelu")(rows), nn.functional.gelu(linear(rows))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool(torch.allclose(found, wanted, atol=1e-5))
