"""How a token embedding becomes bytes, behind one interface.

`fp16` keeps two bytes a dimension. `residual1`, `residual2` and `residual4` keep the nearest of K learned centroids
(four bytes) and 1, 2 or 4 bits a dimension of what is left over, as ColBERTv2 does (Santhanam et al., NAACL 2022,
section 3.3).
Shapes: T tokens, D dimensions, C bytes a token, K centroids, G groups of centroids, N groups next to one.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ckd_ray.arrays import Int32Array
from ckd_ray.errors import JobError, UserError
from ckd_ray.files import filesystem_of, join, write_atomic

Bytes = npt.NDArray[np.uint8]

RESIDUAL_BITS = {"residual1": 1, "residual2": 2, "residual4": 4}
CODEC_NAMES = ("fp16", *RESIDUAL_BITS)
# In the folder of the shards: the learned part of a residual codec, and what it was learned from.
CODEC_FILE, CODEC_RECORD = "codec.safetensors", "codec.json"
_ID_BYTES = 4
# Numbers of a block of similarities to centroids, while encoding: 4 MiB of float32 stay in a core's cache.
_BLOCK = 1 << 20
_GPU_BLOCK = 1 << 28
# Rows that a GPU codes at a time: 256 MiB of float32 at 128 dimensions.
_GPU_ROWS = 1 << 19

with warnings.catch_warnings():
    # torch warns once a process of read-only arrays, which memory-mapped ones are. Nothing here writes to them, so the
    # one warning is provoked and dropped.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"\0\0", np.float16))


class BrokenCodecError(JobError):
    """The learned part of a codec is missing or altered, so the shards in its folder cannot be decoded."""


class Codec(ABC):
    """A codec is fixed before the first shard is written; its name and digest stand in every shard.

    Attributes:
        digest: SHA-256 of the file that holds its learned part, empty when nothing is learned.
    """

    name: str
    dim: int
    digest: str

    @property
    def bytes_per_token(self) -> int:
        """C."""
        return bytes_per_token(self.name, self.dim)

    @abstractmethod
    def encode(self, embeddings_TD: Tensor, device: torch.device | str | None = None) -> Bytes:
        """Rows of any float type, on any device, to bytes (T, C).

        Args:
            device: where codes are computed; that of the rows when None.
        """

    @abstractmethod
    def decode(self, codes_TC: Bytes) -> Tensor:
        """Bytes (T, C) to float16 rows (T, D)."""


class Float16(Codec):
    """Two bytes a dimension: encoding rounds, decoding is a view, read-only when the bytes are memory-mapped."""

    name, digest = "fp16", ""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def encode(self, embeddings_TD: Tensor, device: torch.device | str | None = None) -> Bytes:
        halves = embeddings_TD.detach().to("cpu", torch.float16).contiguous().numpy()
        return halves.view(np.uint8).reshape(len(halves), self.bytes_per_token)

    def decode(self, codes_TC: Bytes) -> Tensor:
        return torch.from_numpy(codes_TC.view(np.float16))


def bytes_per_token(name: str, dim: int) -> int:
    """C: 2 D for fp16, 4 + D * bits / 8 for residual codes (36 for 2 bits and 128 dimensions)."""
    return 2 * dim if name == Float16.name else _ID_BYTES + dim * RESIDUAL_BITS[name] // 8


@dataclass(frozen=True)
class Groups:
    """Centroids in groups, so that a row is compared with those of the groups next to it alone.

    Attributes:
        centers_GD: a row belongs to the group of the greatest inner product.
        bounds: (G + 1,) int64: the centroids of group g are those from bounds[g] up to bounds[g + 1].
        near_GN: int64, the groups whose centroids are candidates for the rows of a group.
    """

    centers_GD: Tensor
    bounds: Tensor
    near_GN: Tensor

    @classmethod
    def one(cls, centroids_KD: Tensor) -> Groups:
        """All centroids in one group: every row is compared with every centroid."""
        zero = torch.zeros(1, 1, dtype=torch.int64)
        return cls(centroids_KD.new_zeros(1, centroids_KD.shape[1]), torch.tensor([0, len(centroids_KD)]), zero)

    def candidates(self, group: int) -> Tensor:
        """Numbers of the centroids that a row of this group is compared with."""
        near = self.near_GN[group].tolist()
        return torch.cat([torch.arange(int(self.bounds[g]), int(self.bounds[g + 1])) for g in near])


class Residual(Codec):
    """A centroid's number and a few bits a dimension. Decoding adds the values of the buckets to the centroid and
    normalises the row.

    Args:
        name: one of `RESIDUAL_BITS`.
        centroids_KD: what rows are compared with, by inner product.
        cutoffs: (2^bits - 1,) ascending bounds between the buckets of a residual's value.
        weights: (2^bits,) the value that a bucket stands for.
        digest: of the file these were read from.
        groups: of the centroids; one when None.

    Raises:
        UserError: D dimensions do not fill whole bytes.
    """

    def __init__(
        self,
        name: str,
        centroids_KD: Tensor,
        cutoffs: Tensor,
        weights: Tensor,
        digest: str = "",
        groups: Groups | None = None,
    ) -> None:
        self.name, self.bits, self.digest = name, RESIDUAL_BITS[name], digest
        self.dim = centroids_KD.shape[1]
        check_dim(name, self.dim)
        self.centroids_KD = centroids_KD.to(torch.float16)
        self.cutoffs, self.weights = cutoffs.float(), weights.float()
        self.groups = groups or Groups.one(self.centroids_KD)
        if len(self.cutoffs) != 2**self.bits - 1 or len(self.weights) != 2**self.bits:
            raise ValueError(f"{name}: expected {2**self.bits} buckets, got {len(self.weights)}")
        # What each byte stands for, so that decoding is one lookup a byte: (256, 8 / bits).
        shifts = torch.arange(0, 8, self.bits)
        self._values = self.weights[(torch.arange(256)[:, None] >> shifts) & (2**self.bits - 1)]

    @property
    def num_centroids(self) -> int:
        """K."""
        return len(self.centroids_KD)

    def nearest_centroids(self, rows_TD: Tensor) -> Tensor:
        """(T,) int64: the centroid of the greatest inner product with each row, on the device of the rows.

        With several groups, the greatest among those of the groups next to the row's own: all rows of a group are one
        matrix product with its candidates.
        """
        rows_TD = rows_TD.float()
        centroids_KD = self.centroids_KD.to(rows_TD.device).float()
        if len(self.groups.centers_GD) == 1:
            return _argmax(rows_TD, centroids_KD)
        out = torch.empty(len(rows_TD), dtype=torch.int64, device=rows_TD.device)
        order = _argmax(rows_TD, self.groups.centers_GD.to(rows_TD.device).float()).sort(stable=True)
        sizes = torch.bincount(order.values, minlength=len(self.groups.centers_GD)).tolist()
        for group, members in enumerate(order.indices.split(sizes)):
            if len(members):
                candidates = self.groups.candidates(group).to(rows_TD.device)
                out[members] = candidates[_argmax(rows_TD[members], centroids_KD[candidates])]
        return out

    def encode(self, embeddings_TD: Tensor, device: torch.device | str | None = None) -> Bytes:
        rows_TD = embeddings_TD.detach()
        device = torch.device(device or rows_TD.device)
        # Groups of centroids want all rows at once; a GPU holds the encoder as well.
        most = max(1, len(rows_TD) if device.type == "cpu" else _GPU_ROWS)
        parts = [self._codes(rows.to(device)) for rows in rows_TD.split(most)]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _codes(self, rows_TD: Tensor) -> Bytes:
        """Bytes (T, C) of rows, computed on their device."""
        device, ids_T = rows_TD.device, self.nearest_centroids(rows_TD)
        centroids_KD, cutoffs = self.centroids_KD.to(device), self.cutoffs.to(device)
        out = np.empty((len(rows_TD), self.bytes_per_token), np.uint8)
        out[:, :_ID_BYTES] = ids_T.to("cpu", torch.int32).numpy().view(np.uint8).reshape(-1, _ID_BYTES)
        step = 1 << 16
        for start in range(0, len(rows_TD), step):
            rows = rows_TD[start : start + step].float()
            residual = rows - centroids_KD[ids_T[start : start + step]].float()
            buckets = torch.bucketize(residual, cutoffs, out_int32=True).to(torch.uint8)
            parts = buckets.view(len(rows), -1, 8 // self.bits)
            packed = torch.zeros(parts.shape[:2], dtype=torch.uint8, device=device)
            for i in range(8 // self.bits):
                packed |= parts[:, :, i] << (i * self.bits)
            out[start : start + step, _ID_BYTES:] = packed.cpu().numpy()
        return out

    def centroid_ids(self, codes_TC: Bytes) -> Int32Array:
        """(T,) int32 centroids of coded rows."""
        return codes_TC[:, :_ID_BYTES].copy().view(np.int32).reshape(-1)

    def packed_buckets(self, codes_TC: Bytes) -> Bytes:
        """(T, D bits / 8): the buckets of coded rows; that of dimension j is at the bits (j * bits) % 8 and up of its
        byte."""
        return codes_TC[:, _ID_BYTES:]

    def decode(self, codes_TC: Bytes) -> Tensor:
        out = torch.empty(len(codes_TC), self.dim, dtype=torch.float16)
        step = 1 << 14  # keeps the float32 rows of a block in the cache
        for start in range(0, len(codes_TC), step):
            codes = codes_TC[start : start + step]
            ids = torch.from_numpy(self.centroid_ids(codes)).long()
            packed = torch.from_numpy(codes[:, _ID_BYTES:].astype(np.int32))
            rows = self._values[packed].view(len(codes), self.dim)
            rows += self.centroids_KD[ids]
            out[start : start + step] = torch.nn.functional.normalize(rows, dim=1)
        return out


def _argmax(rows_TD: Tensor, centroids_KD: Tensor) -> Tensor:
    """(T,) the row of `centroids_KD` with the greatest inner product, a block at a time."""
    step = max(1, (_GPU_BLOCK if rows_TD.is_cuda else _BLOCK) // len(centroids_KD))
    found = [(block @ centroids_KD.T).argmax(1) for block in rows_TD.split(step)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=rows_TD.device)


def check_dim(name: str, dim: int) -> None:
    """Raises UserError when `dim` dimensions do not fill whole bytes under the codec `name`."""
    bits = RESIDUAL_BITS.get(name, 8)
    if dim * bits % 8:
        raise UserError(
            "these dimensions do not fill whole bytes",
            where="model.dim",
            expected=f"a multiple of {8 // bits} for embed.codec {name}",
            found=str(dim),
        )


def save_codec(codec: Residual, folder: str) -> str:
    """Write the learned part of `codec` as `folder`/codec.safetensors, atomically. Returns its digest."""
    from safetensors.torch import save

    tensors = {
        "centroids": codec.centroids_KD,
        "cutoffs": codec.cutoffs,
        "weights": codec.weights,
        "group_centers": codec.groups.centers_GD,
        "group_bounds": codec.groups.bounds,
        "group_near": codec.groups.near_GN,
    }
    metadata = {"ckd_ray.codec": json.dumps({"name": codec.name})}
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    write_atomic(join(folder, CODEC_FILE), lambda stream: stream.write(data))
    return hashlib.sha256(data).hexdigest()


@lru_cache(maxsize=8)
def load_codec(name: str, dim: int, folder: str = "", digest: str = "") -> Codec:
    """The codec `name` of the store in `folder`, with its learned part in `folder`/codec.safetensors.

    Args:
        digest: what `save_codec` returned and the shards carry.

    Raises:
        UserError: there is no such codec.
        BrokenCodecError: its learned part is missing, or is not what the shards were written with.
    """
    if name == Float16.name:
        return Float16(dim)
    if name not in RESIDUAL_BITS:
        raise UserError("unknown codec", where="embed.codec", expected=", ".join(CODEC_NAMES), found=name)
    uri = join(folder, CODEC_FILE)
    fs, path = filesystem_of(uri)
    try:
        with fs.open_input_stream(path) as stream:
            data = stream.read()
    except FileNotFoundError as error:
        raise BrokenCodecError(f"{uri}: missing, so the shards beside it cannot be decoded") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise BrokenCodecError(f"{uri}: not what the shards beside it were written with")
    from safetensors.torch import load

    tensors = load(data)
    groups = Groups(tensors["group_centers"], tensors["group_bounds"], tensors["group_near"])
    codec = Residual(name, tensors["centroids"], tensors["cutoffs"], tensors["weights"], digest, groups)
    if codec.dim != dim:
        raise BrokenCodecError(f"{uri}: has {codec.dim} dimensions, the shards have {dim}")
    return codec
