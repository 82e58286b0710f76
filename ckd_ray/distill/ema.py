"""An exponential moving average of the weights, which takes their place where the model is measured and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """average <- d * average + (1 - d) * weights after every step.

    d is `decay`, but at most (1 + t) / (10 + t) after t steps, so that the start is forgotten in a short run too.

    Args:
        parameters: the weights, in an order that is the same at every start.
        averages: of an earlier run; a copy of the weights when None.
    """

    def __init__(self, parameters: list[Tensor], decay: float, averages: list[Tensor] | None = None) -> None:
        self.parameters, self.decay = parameters, decay
        self.averages = [p.detach().clone() for p in parameters]
        if averages is not None:
            for mine, kept in zip(self.averages, averages, strict=True):
                mine.copy_(kept)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimiser's step number `step` (from 0)."""
        decay = min(self.decay, (2 + step) / (11 + step))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages for its weights within the block."""
        kept = [p.detach().clone() for p in self.parameters]
        self._fill(self.averages)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
