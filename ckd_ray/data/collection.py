"""Reading a built collection: texts at random or in order, ids, queries and labels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc

from ckd_ray.arrays import Float64Array, Int64Array, IntArray
from ckd_ray.data.positives import Positives
from ckd_ray.data.sources import SPLITS
from ckd_ray.errors import JobError, UserError
from ckd_ray.files import (
    ParquetFile,
    exists,
    file_signature,
    filesystem_of,
    first_present,
    is_local,
    join,
    last_part,
    list_files,
    read_object,
    read_parquet,
    sha256_of,
)
from ckd_ray.files.cache import Copies, ShardCache
from ckd_ray.runs.artifact import manifest_file
from ckd_ray.runs.directory import PASSAGE_IDS, QRELS, RunDir

_CACHED_GROUPS = 512  # row groups of a few hundred passages each: tens of megabytes
_REMOTE_READERS = 16
_PASSAGES_A_BLOCK = 8192


@dataclass(frozen=True)
class Queries:
    """ids and texts of a split, by dense query index."""

    ids: list[str]
    texts: list[str]


@dataclass(frozen=True)
class Qrels:
    """Labels of a split, one row each: dense indices, outside ids, and the grade (float64 where one is a fraction)."""

    query_index: Int64Array
    passage_index: Int64Array
    query_ids: list[str]
    passage_ids: list[str]
    relevance: Int64Array | Float64Array


class Collection:
    """Opened by `Collection.open(run)`, which reads the manifest alone."""

    def __init__(self, run: str, manifest: dict[str, Any], keep_copies: bool = False) -> None:
        self.run, self.manifest = run, manifest
        self._copies = Copies(RunDir(run).corpus, manifest.get("files", []) if keep_copies else [])
        self.num_passages: int = manifest["rows"]
        self.splits: list[str] = list(manifest["splits"])
        self._query_files: dict[str, ParquetFile] = {}
        self._groups: OrderedDict[int, list[str]] = OrderedDict()
        self._copied: set[int] = set()

    @classmethod
    def open(cls, run: str, keep_copies: bool = False) -> Collection:
        """The collection of a run directory.

        Args:
            keep_copies: whether `texts` copies files from an object store to this machine's cache, if they fit. This
                suits a training, which reads most passages at random. Without it, only the needed row groups are read.

        Raises:
            JobError: it has not been built. UserError: its manifest is damaged.
        """
        path = manifest_file(RunDir(run).corpus)
        if not exists(path):
            raise JobError(f"{run}: no collection here; run ckd-ray train --until collection")
        manifest = read_object(path)
        rows, splits = manifest.get("rows"), manifest.get("splits")
        # Splits become names of files, so none may be a path.
        if not isinstance(rows, int) or not isinstance(splits, dict) or not set(splits) <= set(SPLITS):
            found = f"rows {rows!r}, splits {splits!r}"[:200]
            fix = "delete it, and ckd-ray train builds the collection again"
            raise UserError("not a collection's manifest", where=path, found=found, fix=fix)
        return cls(run, manifest, keep_copies)

    @cached_property
    def _uris(self) -> list[str]:
        folder = RunDir(self.run).corpus
        return [join(folder, name) for name in list_files(folder, ".parquet")]

    @cached_property
    def _files(self) -> list[ParquetFile]:
        local = is_local(self.run)
        # With pre_buffer the requests of one read are sent together.
        return [ParquetFile(uri, memory_map=local, pre_buffer=not local) for uri in self._uris]

    @cached_property
    def _readers(self) -> ThreadPoolExecutor | None:
        """Requests to an object store wait for the network, so they are sent together."""
        return None if is_local(self.run) else ThreadPoolExecutor(_REMOTE_READERS, "texts")

    @cached_property
    def _bounds(self) -> tuple[Int64Array, list[tuple[int, int]]]:
        """First passage of every row group, and which (file, group) it is."""
        firsts, which, row = [], [], 0
        for i, file in enumerate(self._files):
            for group in range(file.metadata.num_row_groups):
                firsts.append(row)
                which.append((i, group))
                row += file.metadata.row_group(group).num_rows
        return np.array(firsts, np.int64), which

    def texts(self, passages: Sequence[int] | IntArray) -> list[str]:
        """Texts of the passages asked for, in that order; reads only the row groups that hold them."""
        asked, back = np.unique(np.asarray(passages, np.int64), return_inverse=True)
        firsts = self._bounds[0]
        at = np.searchsorted(firsts, asked, side="right") - 1
        # A bounded number of groups at a time, so that memory does not grow with the request.
        batch = np.unique(at, return_inverse=True)[1] // _CACHED_GROUPS
        texts: list[str] = []
        for some in np.split(np.arange(len(asked)), np.flatnonzero(np.diff(batch)) + 1):
            groups = self._row_groups(np.unique(at[some]).tolist())
            rows = asked[some] - firsts[at[some]]
            texts += [groups[g][row] for g, row in zip(at[some].tolist(), rows.tolist(), strict=True)]
        return [texts[i] for i in back.tolist()]

    def _row_groups(self, wanted: list[int]) -> dict[int, list[str]]:
        """Texts of row groups, by their number in the corpus; the most recent ones are cached."""
        found = {g: self._groups[g] for g in wanted if g in self._groups}
        missing: dict[int, list[int]] = {}  # of each file
        for g in wanted:
            if g not in found:
                missing.setdefault(self._bounds[1][g][0], []).append(g)
        read = map if self._readers is None else self._readers.map
        for texts in read(self._read, missing.items()):
            found |= texts
        for g in wanted:
            self._groups[g] = found[g]
            self._groups.move_to_end(g)
        while len(self._groups) > _CACHED_GROUPS:
            self._groups.popitem(last=False)
        return found

    def _read(self, job: tuple[int, list[int]]) -> dict[int, list[str]]:
        """Texts of some row groups of one file: a ParquetFile may serve one thread at a time."""
        file, groups = job
        in_file = [self._bounds[1][g][1] for g in groups]
        if file not in self._copied and (copy := self._copies.here(uri := self._uris[file])) != uri:
            self._files[file] = ParquetFile(uri, copy, metadata=self._files[file].metadata, memory_map=True)
            self._copied.add(file)
        texts = self._files[file].read_row_groups(in_file, columns=["text"], use_threads=False)["text"].to_pylist()
        found, row = {}, 0
        for g, group in zip(groups, in_file, strict=True):
            rows = self._files[file].metadata.row_group(group).num_rows
            found[g] = texts[row : row + rows]
            row += rows
        return found

    def text_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, list[str]]]:
        """(first passage, texts) of blocks of the passages [start, stop), in order; one block is in memory."""
        stop = self.num_passages if stop is None else stop
        for first in range(start, stop, _PASSAGES_A_BLOCK):
            yield first, self.iter_passages(first, min(first + _PASSAGES_A_BLOCK, stop))

    def iter_passages(self, start: int, stop: int) -> list[str]:
        """Texts of the passages [start, stop), read in order and not kept."""
        firsts, which = self._bounds
        low, high = np.searchsorted(firsts, [start, stop - 1], side="right") - 1
        texts: list[str] = []
        for file in sorted({which[g][0] for g in range(low, high + 1)}):
            groups = [which[g][1] for g in range(low, high + 1) if which[g][0] == file]
            texts += self._files[file].read_row_groups(groups, columns=["text"])["text"].to_pylist()
        offset = start - int(firsts[low])
        return texts[offset : offset + stop - start]

    @cached_property
    def _ids(self) -> tuple[list[pa.Array], Int64Array]:
        """The record batches of the file of ids, mapped into memory, and the first passage of each."""
        reader = ipc.open_file(pa.memory_map(self._ids_path()))
        chunks = [reader.get_batch(i).column("passage_id") for i in range(reader.num_record_batches)]
        return chunks, np.cumsum([0, *map(len, chunks)], dtype=np.int64)[:-1]

    def _ids_path(self) -> str:
        """Where the file of ids is on this machine: a remote one is copied once for all processes.

        Raises:
            JobError: it is not the file that the manifest names.
        """
        uri = passage_ids_file(self.run)
        if is_local(self.run):
            return filesystem_of(uri)[1]
        digest = next((str(f["sha256"]) for f in self.manifest["files"] if f["name"] == last_part(uri)), "")
        cache = ShardCache.of_this_machine()
        for _ in range(2):
            path = cache.fetch(uri, digest)
            if sha256_of(path) == digest:
                return path
            cache.discard(uri, digest)  # perhaps the copy is damaged, not the file
        raise JobError(f"{uri}: not the file that its manifest names; run ckd-ray train --from collection")

    def passage_ids(self, passages: Sequence[int] | IntArray) -> list[str]:
        """Outside ids of dense passage indices, in that order."""
        asked = np.asarray(passages, np.int64)
        if not len(asked):
            return []
        chunks, firsts = self._ids
        unique, where = np.unique(asked, return_inverse=True)
        # Chunk by chunk: `take` on all chunks at once would first copy the column.
        at = np.searchsorted(firsts, unique, side="right") - 1
        rows = pa.array(unique - firsts[at])
        bounds = [0, *(np.flatnonzero(np.diff(at)) + 1).tolist(), len(unique)]
        found = [chunks[at[a]].take(rows.slice(a, b - a)) for a, b in pairwise(bounds)]
        return pa.concat_arrays(found).take(pa.array(where)).to_pylist()

    def passage_index(self, ids: Iterable[str]) -> dict[str, int]:
        """Passage id -> dense index, of those `ids` that the collection has. Goes once over all ids."""
        chunks, firsts = self._ids
        wanted, found = pa.array(sorted(set(ids)), pa.string()), dict[str, int]()
        for chunk, first in zip(chunks, firsts.tolist(), strict=True):
            rows = np.flatnonzero(pc.is_in(chunk, value_set=wanted.cast(chunk.type)).to_numpy(zero_copy_only=False))
            found.update(zip(chunk.take(pa.array(rows)).to_pylist(), (rows + first).tolist(), strict=True))
        return found

    def queries(self, split: str) -> Queries:
        """All queries of a split; a part of a large split is better read by `queries_between`."""
        table = read_parquet(join(RunDir(self.run).queries, f"{split}.parquet"))
        return Queries(table["query_id"].to_pylist(), table["text"].to_pylist())

    def num_queries(self, split: str) -> int:
        """How many queries a split has; none of them is read."""
        return int(self._query_file(split).metadata.num_rows)

    def queries_between(self, split: str, first: int, stop: int) -> Queries:
        """The queries [first, stop) of a split; only the row groups that hold them are read."""
        file = self._query_file(split)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        groups = [i for i in range(len(sizes)) if starts[i] < stop and first < starts[i + 1]]
        if not groups:
            return Queries([], [])
        table = file.read_row_groups(groups, use_threads=False).slice(first - int(starts[groups[0]]), stop - first)
        return Queries(table["query_id"].to_pylist(), table["text"].to_pylist())

    def _query_file(self, split: str) -> ParquetFile:
        if split not in self._query_files:
            self._query_files[split] = ParquetFile(join(RunDir(self.run).queries, f"{split}.parquet"))
        return self._query_files[split]

    def qrels(self, split: str) -> Qrels:
        """The labels of a split, as they stand in the input."""
        folder = RunDir(self.run).queries
        uri = first_present(join(folder, QRELS, f"{split}.parquet"), join(folder, f"{split}.qrels.parquet"))
        table = read_parquet(uri)
        relevance = table["relevance"].to_numpy()
        return Qrels(
            table["query_index"].to_numpy().astype(np.int64),
            table["passage_index"].to_numpy(),
            table["query_id"].to_pylist(),
            table["passage_id"].to_pylist(),
            relevance.astype(np.int64) if np.issubdtype(relevance.dtype, np.integer) else relevance,
        )

    def positives(self, split: str, grade: float) -> Positives:
        """The passages of every query of a split with a label of at least `grade`."""
        qrels = self.qrels(split)
        rows = qrels.query_index, qrels.passage_index, qrels.relevance
        return Positives.from_qrels(self.num_queries(split), *rows, grade)


def passage_ids_file(run: str) -> str:
    """The file with the outside ids of all passages, in dense order."""
    corpus = RunDir(run).corpus
    return first_present(join(corpus, PASSAGE_IDS), join(corpus, "ids.arrow"))


def collection_once(run: str) -> Collection:
    """The collection, opened once a process, and again when it has been built anew."""
    return _collection(run, *file_signature(manifest_file(RunDir(run).corpus)))


@lru_cache(maxsize=2)
def _collection(run: str, size: int, changed: int) -> Collection:
    return Collection.open(run)
