"""Putting other layers in the place of an encoder's linear ones."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_linears(module: nn.Module, make: Callable[[nn.Linear], nn.Module | None]) -> int:
    """Replace, in place, every `nn.Linear` below `module` for which `make` gives another layer; returns how many."""
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            made = make(child) if type(child) is nn.Linear else None
            if made is not None:
                setattr(parent, name, made)
                count += 1
    return count
