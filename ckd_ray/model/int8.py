"""Linear layers in 8 bits for CPUs: weights by output channel, activations by token, sums in 32 bits.

Every token has its own scale, so its codes do not depend on its neighbours in the batch, and integer sums have no
order: the products are the same bit for bit however the corpus is cut. Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ckd_ray.model.linears import replace_linears

_LARGEST = 127.0


class Int8Linear(nn.Module):
    """Stands in for a float `nn.Linear` in inference.

    Args:
        linear: whose weights are rounded to 8 bits, each output channel with a scale of its own.
    """

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
        out_TO = (
            sums_TO.mul_(self.scale_O) if self.bias_O is None else torch.addcmul(self.bias_O, sums_TO, self.scale_O)
        )
        return out_TO.view(*inputs.shape[:-1], self.out_features)


def quantise_linears(module: nn.Module) -> int:
    """Replace every `nn.Linear` below `module`, in place; returns how many there were."""
    return replace_linears(module, Int8Linear)
