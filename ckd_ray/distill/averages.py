"""Averages of weights, with which a model is measured and saved: a moving one over the steps (`ema`), and one with the
encoder as it was before any training (`untrained_share`).

The second is WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903). A model that is fine-tuned on one kind of query gets
worse on others. Interpolation with its initial weights keeps most of the gain and recovers most of the loss.
"""

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
        with filled(self.parameters, self.averages):
            yield


class UntrainedAverage:
    """The weights of training averaged with those before it: (1 - share) * weights + share * untrained.

    Args:
        parameters: the weights that training changes.
        untrained: the weights before it, in the same order.
    """

    def __init__(self, parameters: list[Tensor], untrained: list[Tensor], share: float) -> None:
        self.parameters, self.share = parameters, share
        self.untrained = [u.detach().to(p.device, p.dtype) for u, p in zip(untrained, parameters, strict=True)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model has the averages as its weights."""
        pairs = zip(self.parameters, self.untrained, strict=True)
        with filled(self.parameters, [torch.lerp(p.detach(), u, self.share) for p, u in pairs]):
            yield


@contextmanager
def filled(parameters: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """A context in which the parameters have other values."""
    kept = [p.detach().clone() for p in parameters]
    _fill(parameters, values)
    try:
        yield
    finally:
        _fill(parameters, kept)


@torch.no_grad()
def _fill(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
