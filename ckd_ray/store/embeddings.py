"""The token-embedding store: a folder of shards and a manifest, read at random by passage.

Shapes: P passages asked for, T their tokens, D dimensions, V vocabulary ids.
"""

from __future__ import annotations

import hashlib
import resource
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ckd_ray.arrays import Int64Array
from ckd_ray.errors import JobError, UserError
from ckd_ray.files import file_signature, filesystem_of, has_digest, is_local, join, read_object
from ckd_ray.files.cache import FOLDER_VARIABLE, LIMIT_VARIABLE, ShardCache
from ckd_ray.store.codec import CODEC_FILE, CODEC_RECORD, Codec, load_codec
from ckd_ray.store.shard import BrokenShardError, Int32Array, Shard, shard_name
from ckd_ray.store.writing import FREQUENCIES, LENGTHS, MANIFEST, SCHEMA_VERSION

# Memory maps kept open: each costs a file handle and address space, no memory. At most a quarter of the handles that a
# process may have.
_OPEN_SHARDS = 1024


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
        """Rows (P, L, D) filled with zeros, and their bool mask (P, L).

        In numpy, since torch would start a team of threads for each thread that reads ahead.
        """
        longest = max(1, int(self.lengths.max(initial=0)))
        mask_PL = np.arange(longest) < self.lengths[:, None]
        flat_TD = self.embeddings_TD.numpy()
        rows_PLD = np.zeros((len(self.lengths), longest, flat_TD.shape[1]), flat_TD.dtype)
        at = 0
        for rows_LD, length in zip(rows_PLD, self.lengths.tolist(), strict=True):
            rows_LD[:length] = flat_TD[at : at + length]
            at += length
        return torch.from_numpy(rows_PLD), torch.from_numpy(mask_PL)


class EmbeddingStore:
    """Opened by `EmbeddingStore.open(uri)`; cheap to open in every process, since shards are mapped on first use."""

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
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_open = _OPEN_SHARDS if soft == resource.RLIM_INFINITY else max(1, min(_OPEN_SHARDS, soft // 4))
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    @classmethod
    def open(cls, uri: str) -> EmbeddingStore:
        """Read the manifest of a finished store.

        Raises:
            JobError: there is no manifest, or one of another version. UserError: it is damaged.
        """
        try:
            manifest = read_object(join(uri, MANIFEST))
        except FileNotFoundError as error:
            raise JobError(f"{uri}: no finished embedding store here; run the embed stage") from error
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise JobError(f"{uri}: written by another version (schema {manifest.get('schema_version')})")
        try:
            return cls(uri, manifest)
        except UserError:  # the cache cannot be made
            raise
        except (KeyError, TypeError, ValueError) as error:
            fix = "delete it, and the same command writes it again from the shards"
            raise UserError("a damaged manifest", where=join(uri, MANIFEST), found=str(error), fix=fix) from error

    @property
    def codec(self) -> Codec:
        """What decodes the rows; BrokenCodecError when its learned part is missing or altered."""
        return load_codec(self.manifest["codec"], self.dim, self.uri, self.manifest["codec_digest"])

    def shard(self, i: int) -> Shard:
        """Shard `i`, opened once and kept."""
        if i in self._open:
            self._open.move_to_end(i)
            return self._open[i]
        shard = Shard(join(self.uri, shard_name(i)), self._cache, self._shards[i]["sha256"])
        self._open[i] = shard
        while len(self._open) > 1 and not self._may_stay_open():
            self._open.popitem(last=False)
        return shard

    def check_room(self, shards: Sequence[int], processes: int = 1) -> None:
        """Check that the cache has room if each of `processes` processes of this machine keeps as many shards open.

        Raises:
            UserError: the shards come from an object store, and their copies need more than the cache may hold.
        """
        wanted = min(processes * sum(int(self._shards[i]["bytes"]) for i in shards), int(self.manifest["bytes"]))
        if self._cache is not None and wanted > self._cache.limit:
            raise UserError(
                "the shards that this machine is to serve are more than its cache of remote files may hold",
                where=LIMIT_VARIABLE,
                expected=f"at least {wanted / 2**30:.1f} GiB",
                found=f"{self._cache.limit / 2**30:.1f} GiB in {self._cache.folder}",
                fix=f"set {LIMIT_VARIABLE} higher (and {FOLDER_VARIABLE} to a larger disk), add nodes, or take a"
                " smaller embed.codec",
            )

    def _may_stay_open(self) -> bool:
        """Maps of cached copies hold space on the disk even after the cache has removed the copies."""
        if len(self._open) > self._most_open:
            return False
        return self._cache is None or sum(s.codes.nbytes for s in self._open.values()) <= self._cache.limit

    def spans(self) -> list[tuple[int, int]]:
        """(first, stop) of the passages of every shard."""
        return list(pairwise([*self.firsts.tolist(), self.num_passages]))

    def shard_tokens(self, i: int) -> int:
        """Rows of shard `i`, from the manifest."""
        return int(self._shards[i]["tokens"])

    @property
    def document_frequencies(self) -> Int64Array:
        """(V,) passages that hold each token id; V is one more than the largest id met."""
        return self._array(FREQUENCIES, np.dtype("<i8"), self.manifest["vocabulary"])

    def lengths(self) -> Int32Array:
        """(num_passages,) int32 rows of every passage, memory-mapped."""
        return self._array(LENGTHS, np.dtype("<i4"), self.num_passages)

    def _array(self, name: str, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        """A file that `close_store` wrote, checked when it is first read."""
        if name not in self._arrays:
            uri, digest = join(self.uri, name), self.manifest["sha256"][name]
            values = self._map(uri, digest, dtype, count)
            if values is None and self._cache:
                self._cache.discard(uri, digest)
                values = self._map(uri, digest, dtype, count)
            if values is None:
                raise BrokenShardError(f"{uri}: not what the manifest names", uri)
            self._arrays[name] = values
        return self._arrays[name]

    def _map(self, uri: str, digest: str, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any] | None:
        """None when the file is missing or its bytes are not those of `digest`."""
        if count == 0:
            return np.empty(0, dtype)
        try:
            path = self._cache.fetch(uri, digest) if self._cache else filesystem_of(uri)[1]
            values = np.memmap(path, dtype, "r")
        except (FileNotFoundError, ValueError):  # ValueError: empty, or a part of a value at the end
            return None
        return values if len(values) == count and hashlib.sha256(values.data).hexdigest() == digest else None

    def gather(self, passages: Int64Array) -> Ragged:
        """The passages asked for (P of them), in that order, duplicates allowed; each is compared with its checksum.

        Raises:
            IndexError: there is no such passage. BrokenShardError: the bytes of one are not what was written.
        """
        passages = np.asarray(passages, np.int64)
        if len(passages) and (passages.min() < 0 or passages.max() >= self.num_passages):
            raise IndexError(f"passage index out of 0..{self.num_passages - 1}")
        lengths = np.asarray(self.lengths()[passages], np.int32)
        at = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        codec = self.codec
        codes_TC = np.empty((int(at[-1]), codec.bytes_per_token), np.uint8)
        token_ids = np.empty(int(at[-1]), np.int32)
        which = np.searchsorted(self.firsts, passages, side="right") - 1
        order = np.argsort(which, kind="stable")
        starts = np.flatnonzero(np.diff(which[order], prepend=-1))
        for group in np.split(order, starts[1:]) if len(order) else []:
            index = int(which[group[0]])
            shard = self.shard(index)
            local = passages[group] - shard.first
            try:
                shard.check_lengths(local, lengths[group])
                shard.copy(local.tolist(), codes_TC, token_ids, at[group].tolist())
            except BrokenShardError:
                self._open.pop(index)  # the repaired file has the same name; this map still shows the broken one
                raise
        return Ragged(codec.decode(codes_TC), lengths, token_ids)

    def verify(self, shards: Iterable[int] | None = None) -> list[str]:
        """Read every byte of these shards, or of all; the names of the files that are missing or broken.

        Reads the store itself, not the copies in this machine's cache. Memory: one shard when the store is remote.
        """
        broken = []
        for i in range(self.num_shards) if shards is None else shards:
            try:
                Shard(join(self.uri, shard_name(i)), digest=self._shards[i]["sha256"]).verify()
            except (BrokenShardError, FileNotFoundError):
                broken.append(shard_name(i))
        return broken

    def verify_other_files(self) -> list[str]:
        """As `verify`, of the files that are no shards: the codec, lengths and document frequencies."""
        digests = dict(self.manifest["sha256"])
        if self.manifest["codec_digest"]:
            digests[CODEC_FILE] = self.manifest["codec_digest"]
        wrong = [name for name, digest in digests.items() if not has_digest(join(self.uri, name), digest)]
        return [*wrong, CODEC_RECORD] if CODEC_FILE in wrong else wrong


def open_once(uri: str) -> EmbeddingStore:
    """A store, opened once a process, and again when it has been written anew."""
    return _store(uri, *file_signature(join(uri, MANIFEST)))


@lru_cache(maxsize=8)
def _store(uri: str, size: int, changed: int) -> EmbeddingStore:
    return EmbeddingStore.open(uri)
