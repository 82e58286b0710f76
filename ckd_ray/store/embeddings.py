"""The token-embedding store: a folder of shards and a manifest, read at random by passage.

Shapes: P passages asked for, T their tokens, D dimensions, V vocabulary ids.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ckd_ray.errors import JobError
from ckd_ray.store.cache import ShardCache
from ckd_ray.store.codec import CODEC_FILE, CODEC_RECORD, BrokenCodecError
from ckd_ray.store.files import is_local, join, list_files, read_json, write_json_atomic
from ckd_ray.store.shard import BrokenShardError, Int32Array, Shard, ShardHeader, read_header, shard_name

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_OPEN_SHARDS = 1024  # memory maps kept open; each costs a file handle and address space, no memory of its own


@dataclass(frozen=True)
class Ragged:
    """Some passages, flat: embeddings_TD float16, lengths (P,) int32, token_ids (T,) int32."""

    embeddings_TD: torch.Tensor
    lengths: Int32Array
    token_ids: Int32Array

    def split(self) -> list[torch.Tensor]:
        """One (L_i, D) view a passage."""
        return list(torch.split(self.embeddings_TD, self.lengths.tolist()))

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (P, L, D) filled with zeros, and their bool mask (P, L)."""
        longest = max(1, int(self.lengths.max(initial=0)))
        mask_PL = torch.arange(longest)[None] < torch.from_numpy(self.lengths.astype(np.int64))[:, None]
        rows_PLD = self.embeddings_TD.new_zeros(len(self.lengths), longest, self.embeddings_TD.shape[1])
        rows_PLD[mask_PL] = self.embeddings_TD
        return rows_PLD, mask_PL


class EmbeddingStore:
    """Opened by `EmbeddingStore.open(uri)`; cheap to open in every process, since shards are mapped on first use.

    Attributes:
        manifest: the JSON beside the shards.
        num_passages, num_tokens, num_shards, dim: sizes.
    """

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        self.uri = uri
        self.manifest = manifest
        self.num_passages: int = manifest["passages"]
        self.num_tokens: int = manifest["tokens"]
        self.dim: int = manifest["dim"]
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self.num_shards = len(self._shards)
        self.firsts = np.array([s["first"] for s in self._shards], np.int64)
        self._cache = None if is_local(uri) else ShardCache.of_this_machine()
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._frequencies: npt.NDArray[np.int64] | None = None

    @classmethod
    def open(cls, uri: str) -> EmbeddingStore:
        """Read the manifest of a finished store.

        Raises:
            JobError: there is no manifest: the stage that writes it has not finished.
        """
        try:
            manifest = read_json(join(uri, MANIFEST))
        except FileNotFoundError as error:
            raise JobError(f"{uri}: no finished embedding store here; run the embed stage") from error
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise JobError(f"{uri}: written by another version (schema {manifest.get('schema_version')})")
        return cls(uri, manifest)

    def shard(self, i: int) -> Shard:
        """Shard `i`, opened once and kept."""
        if i in self._open:
            self._open.move_to_end(i)
            return self._open[i]
        uri, digest = join(self.uri, shard_name(i)), self._shards[i]["sha256"]
        shard = Shard(uri, self._cache.fetch(uri, digest) if self._cache else None)
        if shard.header.sha256 != digest:
            raise BrokenShardError(f"{uri}: not the shard that the manifest names", uri)
        self._open[i] = shard
        while len(self._open) > 1 and not self._may_stay_open():
            self._open.popitem(last=False)
        return shard

    def _may_stay_open(self) -> bool:
        """Maps of cached copies hold their space on the disk even when the cache has dropped them."""
        if len(self._open) > _OPEN_SHARDS:
            return False
        return self._cache is None or sum(s.codes.nbytes for s in self._open.values()) <= self._cache.limit

    def shard_tokens(self, i: int) -> int:
        """Rows of shard `i`, from the manifest."""
        return int(self._shards[i]["tokens"])

    @property
    def document_frequencies(self) -> npt.NDArray[np.int64]:
        """(V,) passages that hold each token id; V is one more than the largest id met."""
        if self._frequencies is None:
            total = np.zeros(self.manifest["vocabulary"], np.int64)
            for i in range(self.num_shards):
                shard = self.shard(i)
                total[shard.frequency_ids] += shard.frequency_counts
            self._frequencies = total
        return self._frequencies

    def lengths(self) -> Int32Array:
        """(num_passages,) int32 rows of every passage."""
        if not self.num_shards:
            return np.empty(0, np.int32)
        return np.concatenate([self.shard(i).lengths for i in range(self.num_shards)])

    def gather(self, passages: npt.NDArray[np.int64]) -> Ragged:
        """The passages asked for, in that order, duplicates allowed (P of them)."""
        passages = np.asarray(passages, np.int64)
        if len(passages) and (passages.min() < 0 or passages.max() >= self.num_passages):
            raise IndexError(f"passage index out of 0..{self.num_passages - 1}")
        which = np.searchsorted(self.firsts, passages, side="right") - 1
        rows: list[torch.Tensor] = []
        ids: list[Int32Array] = []
        for i, passage in zip(which.tolist(), passages.tolist(), strict=True):
            shard = self.shard(i)
            local = passage - shard.first
            rows.append(shard.embeddings(local, local + 1))
            ids.append(shard.token_ids[shard.offsets[local] : shard.offsets[local + 1]])
        flat = torch.cat(rows) if rows else torch.empty(0, self.dim, dtype=torch.float16)
        token_ids = np.concatenate(ids) if ids else np.empty(0, np.int32)
        return Ragged(flat, np.array([len(x) for x in ids], np.int32), token_ids)

    def verify(self, shards: Iterable[int] | None = None) -> list[str]:
        """Read these shards, or all, whole; the names of the files that are broken.

        Without their codec no shard can be decoded, so when that is broken all are named, and what it was learned from.
        """
        broken = []
        for i in range(self.num_shards) if shards is None else shards:
            try:
                self.shard(i).verify()
            except BrokenShardError:
                self._open.pop(i, None)
                broken.append(shard_name(i))
            except BrokenCodecError:
                return [CODEC_RECORD, CODEC_FILE, *(shard_name(k) for k in range(self.num_shards))]
        return broken


def intact_shards(uri: str, fingerprint: str) -> tuple[dict[int, ShardHeader], dict[str, str]]:
    """Shards of this very run that a stopped stage has left in `uri`, checked byte by byte, and what was refused.

    Returns:
        headers by shard index, and for each file name that is broken or foreign the reason.
    """
    good: dict[int, ShardHeader] = {}
    refused: dict[str, str] = {}
    for name in list_files(uri, ".arrow"):
        try:
            header, _, _ = read_header(join(uri, name))
            if header.fingerprint != fingerprint or shard_name(header.index) != name:
                refused[name] = f"{name}: written by another run"
                continue
            Shard(join(uri, name)).verify()
            good[header.index] = header
        except BrokenShardError as error:
            refused[name] = str(error)
    return good, refused


def write_manifest(uri: str, fingerprint: str, headers: list[ShardHeader], size: int, **extra: Any) -> None:
    """Close a store: all shards are there, so name them with their checksums."""
    headers = sorted(headers, key=lambda h: h.index)
    vocabulary = 0
    for header in headers:
        _, ids, _ = read_header(join(uri, shard_name(header.index)))
        vocabulary = max(vocabulary, int(ids.max(initial=-1)) + 1)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "passages": sum(h.passages for h in headers),
        "tokens": sum(h.tokens for h in headers),
        "dim": headers[0].dim if headers else 0,
        "codec": headers[0].codec if headers else "fp16",
        "vocabulary": vocabulary,
        "bytes": size,
        "shards": [
            {k: v for k, v in asdict(h).items() if k in ("first", "passages", "tokens", "sha256")} for h in headers
        ],
        **extra,
    }
    write_json_atomic(join(uri, MANIFEST), manifest)
