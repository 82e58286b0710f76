"""An exponential moving average of the weights, with which the model is measured and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """average <- d * average + (1 - d) * weights after every step.

    d is `decay`, but at most (1 + t) / (10 + t) after t steps, so that a short training forgets the start as well.

    Args:
        parameters: the weights, in the same order at every start.
        averages: the averages to resume from; None starts with a copy of the weights.
    """

    def __init__(self, parameters: list[Tensor], decay: float, averages: list[Tensor] | None = None) -> None:
        self.parameters, self.decay = parameters, decay
        self.averages = [p.detach().clone() for p in parameters]
        if averages is not None:
            for mine, kept in zip(self.averages, averages, strict=True):
                mine.copy_(kept)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call after the optimiser's step number `step` (from 0)."""
        decay = min(self.decay, (2 + step) / (11 + step))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model has the averages as its weights."""
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
