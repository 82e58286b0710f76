"""How a token embedding becomes bytes, behind one interface. Shapes: T tokens, D dimensions, C bytes a token."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ckd_ray.errors import UserError

Bytes = npt.NDArray[np.uint8]


class Codec(Protocol):
    """A codec is fixed before the first shard is written; its name stands in the manifest of the store."""

    name: str
    dim: int

    @property
    def bytes_per_token(self) -> int:
        """C."""

    def encode(self, embeddings_TD: torch.Tensor) -> Bytes:
        """Rows of any float type to bytes (T, C)."""

    def decode(self, codes_TC: Bytes) -> torch.Tensor:
        """Bytes (T, C) to float16 rows (T, D)."""


class Float16:
    """Two bytes a dimension; decoding is a view, nothing is copied."""

    name = "fp16"

    def __init__(self, dim: int) -> None:
        self.dim = dim

    @property
    def bytes_per_token(self) -> int:
        """C = 2 D."""
        return 2 * self.dim

    def encode(self, embeddings_TD: torch.Tensor) -> Bytes:
        """Round to the nearest float16."""
        halves = embeddings_TD.detach().to("cpu", torch.float16).contiguous().numpy()
        return halves.view(np.uint8).reshape(len(halves), self.bytes_per_token)

    def decode(self, codes_TC: Bytes) -> torch.Tensor:
        """A float16 view of the bytes; read-only when the bytes are memory-mapped."""
        return _as_tensor(codes_TC.view(np.float16))


def make_codec(name: str, dim: int) -> Codec:
    """The codec `name` for rows of D = `dim`."""
    if name == Float16.name:
        return Float16(dim)
    raise UserError("unknown codec", where="embed.codec", expected=Float16.name, found=name)


def _as_tensor(values: npt.NDArray[np.float16]) -> torch.Tensor:
    # Memory-mapped arrays are read-only and torch warns that it cannot know; nothing here writes to them.
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)
