"""Reading weights that others wrote: safetensors, or torch files without code in them."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ckd_ray.errors import UserError, first_line
from ckd_ray.model.exchange.detect import read_object


def load_torch(path: Path) -> Any:
    """The contents of a torch file: tensors and plain values; anything else is refused, so no code can run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            "this torch file is not read",
            where=str(path),
            expected="tensors, numbers, text, lists and dicts (torch.load with weights_only)",
            found=first_line(error),
            fix="if you trust its source, open it there and save the state dict alone",
        ) from error


def read_tensor(folder: Path, name: str) -> Tensor:
    """One tensor of a saved model, float32: from safetensors (also in parts), else from pytorch_model.bin."""
    file = _file_with(folder, name)
    if file is None:
        found = ", ".join(sorted(p.name for p in folder.glob("*"))[:12]) or "nothing"
        raise UserError("no weights here", where=str(folder), expected="model.safetensors", found=found)
    if file.suffix == ".safetensors":
        return _from_safetensors(file, name)
    state = load_torch(file)
    if not isinstance(state, dict) or not isinstance(state.get(name), Tensor):
        raise UserError(f"no tensor {name}", where=str(file), found=_keys(state))
    return state[name].float()


def _file_with(folder: Path, name: str) -> Path | None:
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return folder / single
        index = folder / f"{single}.index.json"
        if index.is_file():
            parts = read_object(index).get("weight_map", {})
            if name not in parts:
                raise UserError(f"no tensor {name}", where=str(index), found=_keys(parts))
            return folder / Path(str(parts[name])).name
    return None


def _from_safetensors(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
            if name not in keys:
                raise UserError(f"no tensor {name}", where=str(file), found=", ".join(keys[:8]) or "nothing")
            return tensors.get_tensor(name).float()
    except (SafetensorError, OSError) as error:
        raise UserError("not a safetensors file", where=str(file), found=str(error)) from error


def _keys(value: Any) -> str:
    return ", ".join(str(key) for key in list(value)[:8]) if isinstance(value, dict) else type(value).__name__


def as_matrix(weight: Tensor, where: str) -> Tensor:
    """`weight` when it is a matrix of finite numbers, else a UserError."""
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        shape = f"shape {tuple(weight.shape)}" if weight.ndim != 2 else "numbers that are not finite"
        raise UserError("the projection is no usable matrix", where=where, expected="(dim, hidden size)", found=shape)
    return weight
