"""Builds `corpus/` and `queries/` from a source, and checks the collection as a whole.

The corpus is streamed. Memory holds one block of texts, eight bytes an id (to find duplicates), and the labels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from ckd_ray.config import CollectionConfig
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.data.readers import QrelRow, TextRow
from ckd_ray.data.sources import Source, open_source
from ckd_ray.files import (
    new_folder,
    parquet_writer,
    remove_stale,
    sha256_of,
    signatures,
    write_json_atomic,
    write_parquet,
)
from ckd_ray.progress import say
from ckd_ray.runs.artifact import MANIFEST
from ckd_ray.runs.directory import PASSAGE_IDS, QRELS, RunDir

SCHEMA_VERSION = 1
ROWS_A_GROUP = 256  # training reads passages at random, a row group each
_ROWS_A_FILE = 131_072
_ROWS_A_BLOCK = 4096
_DUPLICATES_NAMED = 20
_PASSAGES = pa.schema([("passage_id", pa.string()), ("text", pa.large_string())])
_IDS = pa.schema([("passage_id", pa.large_string())])

Advance = Callable[[int, int | None], None]


@dataclass
class CollectionManifest:
    """Sizes of a built collection, counts of what is odd but kept, and the fingerprint of the contents."""

    num_passages: int
    fingerprint: str
    empty_passages: int
    mended_passages: int = 0
    cut_by_limit: int = 0
    limit: int | None = None
    splits: dict[str, dict[str, int]] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """For the manifest of the stage and the closing table."""
        found = {"empty_passages": self.empty_passages, "splits": self.splits}
        return found | ({"cut_by_limit": self.cut_by_limit} if self.limit is not None else {})


@dataclass
class _Split:
    """Queries and labels of a split.

    Attributes:
        repeated: labels that were read and are left out, since they repeat an earlier one.
        elsewhere: queries that were read from a file of all splits and have no label in this one.
    """

    ids: list[str]
    texts: list[str]
    labels: list[QrelRow]
    repeated: int = 0
    elsewhere: int = 0


def build_collection(settings: CollectionConfig, out: str, *, progress: Advance | None = None) -> CollectionManifest:
    """Read the configured collection and write `out`/queries and `out`/corpus.

    With `limit` the corpus keeps every labelled passage, however many there are, so that no query loses its label, and
    the first others up to `limit` passages in all. (Docstrings are cut before they are labelled.)

    Raises:
        InputError: lists what is wrong, with file and line; up to 20 problems at once.
        UserError: a file is missing or cannot be read.
    """
    run = RunDir(out)
    remove_stale(run.queries)  # the stage does so for the corpus, which is its own folder
    source = open_source(settings)
    problems = Problems()
    splits = {split: _read_split(source, split, problems) for split in source.splits}
    problems.check()
    wanted = {row.passage_id: -1 for split in splits.values() for row in split.labels}
    with new_folder(run.corpus) as folder:
        writer = _CorpusWriter(folder, wanted, settings.limit, progress or (lambda done, total: None))
        writer.write(source.passages(problems), problems)
        _name_duplicates(source, writer.duplicates(), problems)
        _check_labels(splits, wanted, problems)
        _check_training(splits, settings, problems)
        problems.check()
        digest = writer.digest
        manifest = CollectionManifest(writer.count, "", writer.empty, writer.mended, writer.cut, settings.limit)
        with new_folder(run.queries) as queries:
            for name, split in splits.items():
                manifest.splits[name] = _write_split(queries, name, split, wanted, settings.positive_grade, digest)
            manifest.fingerprint = digest.hexdigest()
            _write_manifest(queries, manifest, sum(s["queries"] for s in manifest.splits.values()))
        _write_manifest(folder, manifest, writer.count)
    _report(manifest, source)
    _report_shared(splits)
    return manifest


def source_signature(settings: CollectionConfig) -> str:
    """Changes with the input files (size, time of change) or installed packages (version); reads no contents.

    Raises:
        UserError: a file is missing.
    """
    if settings.format == "docstrings":
        from ckd_ray.data.docstrings import versions

        return repr(sorted(versions(settings).items()))
    return repr(signatures(open_source(settings).files))


def _read_split(source: Source, split: str, problems: Problems) -> _Split:
    ids: list[str] = []
    texts: list[str] = []
    where: dict[str, str] = {}
    blank: set[str] = set()
    for row in source.queries(split, problems):
        if not _is_id(row, "query", problems):
            continue
        if row.id in where:
            found = f"{shorten(row.id)}, also at {where[row.id]}"
            problems.add(row.where, "a duplicate query id", expected="unique ids", found=found)
        else:
            where[row.id] = row.where
            ids.append(row.id)
            texts.append(row.text)
            if not row.text.strip():
                blank.add(row.id)
    labels: list[QrelRow] = []
    seen: dict[tuple[str, str], QrelRow] = {}
    repeated = 0
    for label in source.qrels(split, problems):
        key = (label.query_id, label.passage_id)
        if label.query_id not in where:
            expected = f"a query of split {split}"
            problems.add(label.where, "a label of an unknown query", expected=expected, found=shorten(label.query_id))
        elif key not in seen:
            seen[key] = label
            labels.append(label)
        elif seen[key].relevance == label.relevance:
            repeated += 1
        else:
            problem, expected = "a second grade for the same query and passage", f"{seen[key].relevance} as at "
            problems.add(label.where, problem, expected=expected + seen[key].where, found=str(label.relevance))
    for name in sorted(blank & {label.query_id for label in labels}):
        fix = "write it, or leave the query and its labels out, as `ckd-ray init` does"
        problems.add(where[name], "a labelled query without text", expected="words", found=shorten(name), fix=fix)
    elsewhere = 0
    if source.shared_queries:
        labelled = {label.query_id for label in labels}
        kept = [i for i, name in enumerate(ids) if name in labelled]
        elsewhere = len(ids) - len(kept)
        ids, texts = [ids[i] for i in kept], [texts[i] for i in kept]
    return _Split(ids, texts, labels, repeated, elsewhere)


def _is_id(row: TextRow, what: str, problems: Problems) -> bool:
    """Whether the row has an id. An empty one is noted, and so is one with a NUL, where tools in C would cut it."""
    if row.id.strip() and "\0" not in row.id:
        return True
    problem = f"a NUL character in a {what} id" if row.id.strip() else f"an empty {what} id"
    problems.add(row.where, problem, expected="an id", found=shorten(row.id))
    return False


class _CorpusWriter:
    """Writes a stream of passages: Parquet files, and the ids as a memory-mapped Arrow file.

    Attributes:
        wanted: labelled passage ids; their dense indices are filled in.
    """

    def __init__(self, folder: str, wanted: dict[str, int], limit: int | None, progress: Advance) -> None:
        self.folder, self.wanted, self.limit, self.progress = folder, wanted, limit, progress
        self.count = self.empty = self.mended = self.cut = 0
        self.digest = hashlib.sha256(f"ckd-ray collection {SCHEMA_VERSION}".encode())
        self._others = 0  # unlabelled passages kept
        self._labelled = len(wanted)
        self._hashes: list[np.ndarray] = []
        self._parquet: pq.ParquetWriter | None = None
        self._rows_in_file = self._files = 0
        self._met: set[str] = set()

    def write(self, rows: Iterator[TextRow], problems: Problems) -> None:
        """Stream all passages to the disk."""
        with pa.OSFile(os.path.join(self.folder, PASSAGE_IDS), "wb") as sink, ipc.new_file(sink, _IDS) as ids:
            block: list[TextRow] = []
            for row in rows:
                if not _is_id(row, "passage", problems):
                    continue
                if not self._keeps(row.id):
                    self.cut += 1
                    continue
                block.append(row)
                if len(block) == _ROWS_A_BLOCK:
                    self._flush(block, ids)
                    block = []
            self._flush(block, ids)
        if self._parquet is not None:
            self._parquet.close()
        if not self.count and not problems.lines:
            problems.add("collection", "no passages", expected="at least one", found="an empty file")

    def _keeps(self, name: str) -> bool:
        if self.limit is None or name in self.wanted:
            return True
        if self._others >= max(0, self.limit - self._labelled):
            return False
        self._others += 1
        return True

    def _flush(self, block: list[TextRow], ids: Any) -> None:
        if not block:
            return
        names = [row.id for row in block]
        texts = [row.text for row in block]
        for i, name in enumerate(names):
            if name in self.wanted and name not in self._met:
                self._met.add(name)
                self.wanted[name] = self.count + i
        self.empty += sum(not text or text.isspace() for text in texts)
        self.digest.update(self._bytes(names, texts))
        keys = pa.array(names, pa.large_string())
        self._hashes.append(pd.util.hash_array(np.array(names, object), categorize=False))
        table = pa.table([keys.cast(pa.string()), pa.array(texts, pa.large_string())], schema=_PASSAGES)
        if self._parquet is None or self._rows_in_file >= _ROWS_A_FILE:
            if self._parquet is not None:
                self._parquet.close()
            path = os.path.join(self.folder, f"part-{self._files:05d}.parquet")
            self._parquet = parquet_writer(path, _PASSAGES)
            self._files, self._rows_in_file = self._files + 1, 0
        self._parquet.write_table(table, row_group_size=ROWS_A_GROUP)
        ids.write_table(pa.table([keys], schema=_IDS))
        self._rows_in_file += len(block)
        self.count += len(block)
        self.progress(self.count, None)

    def _bytes(self, names: list[str], texts: list[str]) -> bytes:
        """The input of the fingerprint; texts that UTF-8 cannot hold are replaced in place, and counted."""
        try:
            return _hashable(names, texts)
        except UnicodeEncodeError:
            for i, text in enumerate(texts):
                texts[i] = _storable(text)
                self.mended += texts[i] != text
            return _hashable(names, texts)

    def duplicates(self) -> set[str]:
        """Ids that occur twice, 20 at most: found by 8-byte hashes, confirmed by the ids themselves."""
        found: set[str] = set()
        hashes = np.concatenate([np.empty(0, np.uint64), *self._hashes])
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        same = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
        if not len(same):
            return found
        with pa.memory_map(os.path.join(self.folder, PASSAGE_IDS)) as source:
            column = ipc.open_file(source).read_all()["passage_id"]
            seen: set[str] = set()
            for i in same.tolist():
                if i == 1 or hashes[i - 2] != hashes[i - 1]:  # the first of its hash
                    seen = {column[int(order[i - 1])].as_py()}
                name = column[int(order[i])].as_py()
                if name in seen:
                    found.add(name)
                    if len(found) >= _DUPLICATES_NAMED:
                        break
                seen.add(name)
        return found


def _hashable(names: list[str], texts: list[str]) -> bytes:
    """Texts with their lengths, so that different lists give different bytes."""
    rows = zip(names, texts, strict=True)
    return "".join([f"{len(name)}:{len(text)}:{name}{text}" for name, text in rows]).encode()


def _name_duplicates(source: Source, names: set[str], problems: Problems) -> None:
    """Reads the source again for both places of each duplicate, since places are not kept."""
    if not names:
        return
    first: dict[str, str] = {}
    for row in source.passages(Problems(most=None)):
        if row.id not in names:
            continue
        if row.id in first:
            found = f"{shorten(row.id)}, also at {first[row.id]}"
            problems.add(row.where, "a duplicate passage id", expected="unique ids", found=found)
        else:
            first[row.id] = row.where


def _storable(text: str) -> str:
    """Lone surrogates, which JSON can hold and UTF-8 cannot, become question marks."""
    return text.encode("utf-8", "replace").decode()


def _check_training(splits: dict[str, _Split], settings: CollectionConfig, problems: Problems) -> None:
    """Notes that no training query has a positive label, unless other problems are the likelier cause."""
    split, grade = splits.get("train"), settings.positive_grade
    if split is not None and not problems.lines and all(row.relevance < grade for row in split.labels):
        problems.add(
            f"split {settings.train}",
            "no training query has a positive label",
            expected=f"a label of grade {grade} (collection.positive_grade) or more",
            found=f"{len(split.ids)} queries, {len(split.labels)} labels",
        )


def _check_labels(splits: dict[str, _Split], wanted: dict[str, int], problems: Problems) -> None:
    for split in splits.values():
        for label in split.labels:
            if wanted[label.passage_id] < 0:
                problem, found = "a label of an unknown passage", shorten(label.passage_id)
                problems.add(label.where, problem, expected="a passage id of the corpus", found=found)


def _write_split(
    folder: str, name: str, split: _Split, wanted: dict[str, int], positive_grade: float, digest: Any
) -> dict[str, int]:
    texts = [_storable(text) for text in split.texts]
    mended = sum(a != b for a, b in zip(texts, split.texts, strict=True))
    queries = pa.table(
        {
            "query_id": pa.array(split.ids, pa.string()),
            "text": pa.array(texts, pa.large_string()),
            "split": pa.array([name] * len(texts), pa.string()),  # the folder may be read as one table
        }
    )
    write_parquet(queries, os.path.join(folder, f"{name}.parquet"), row_group_size=_ROWS_A_BLOCK)
    index = {query: i for i, query in enumerate(split.ids)}
    labels = split.labels
    grades = [row.relevance for row in labels]
    whole = all(isinstance(grade, int) for grade in grades)
    table = pa.table(
        {
            "query_index": pa.array([index[row.query_id] for row in labels], pa.int32()),
            "passage_index": pa.array([wanted[row.passage_id] for row in labels], pa.int64()),
            "query_id": pa.array([row.query_id for row in labels], pa.string()),
            "passage_id": pa.array([row.passage_id for row in labels], pa.string()),
            "relevance": pa.array(grades, pa.int32() if whole else pa.float64()),
        }
    )
    os.makedirs(os.path.join(folder, QRELS), exist_ok=True)
    write_parquet(table, os.path.join(folder, QRELS, f"{name}.parquet"))
    digest.update(f"split {name} {len(split.ids)} {len(labels)}:".encode())
    digest.update(_hashable(split.ids, texts))
    for row in labels:
        digest.update(f"{len(row.query_id)}:{row.query_id}:{wanted[row.passage_id]}:{row.relevance};".encode())
    labelled = {row.query_id for row in labels if row.relevance >= positive_grade}
    found = {"queries": len(split.ids), "labels": len(labels), "unlabelled": len(split.ids) - len(labelled)}
    also = {"repeated_labels": split.repeated, "queries_elsewhere": split.elsewhere, "mended_queries": mended}
    return found | {what: count for what, count in also.items() if count}


def _write_manifest(folder: str, manifest: CollectionManifest, rows: int) -> None:
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".parquet", ".arrow"))
    files: list[dict[str, Any]] = [
        {
            "name": p.relative_to(folder).as_posix(),
            "rows": _rows(str(p)),
            "bytes": p.stat().st_size,
            "sha256": sha256_of(str(p)),
        }
        for p in paths
    ]
    counts = ("splits", "empty_passages", "mended_passages", "cut_by_limit", "limit")
    value = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": manifest.fingerprint,
        "rows": rows,
        "bytes": sum(int(f["bytes"]) for f in files),
        "files": files,
        **{name: getattr(manifest, name) for name in counts},
    }
    write_json_atomic(os.path.join(folder, MANIFEST), value)


def _rows(path: str) -> int:
    if path.endswith(".parquet"):
        return int(pq.read_metadata(path).num_rows)
    with pa.memory_map(path) as source:
        return int(ipc.open_file(source).read_all().num_rows)


def _report(manifest: CollectionManifest, source: Source) -> None:
    """Messages about what is odd in the collection but kept."""

    def note(count: int, message: str) -> None:
        if count:
            say(f"collection: {message}")

    surrogates = "held half a surrogate pair, now a question mark"
    empty, mended, cut = manifest.empty_passages, manifest.mended_passages, manifest.cut_by_limit
    note(empty, f"{empty:,} passages are empty; they are kept, though few queries can find them")
    note(mended, f"{mended:,} passages {surrogates}")
    note(cut, f"collection.limit ({manifest.limit or 0:,}) leaves out {cut:,} passages")
    for name, split in manifest.splits.items():
        repeated, mended, unlabelled = (split.get(k, 0) for k in ("repeated_labels", "mended_queries", "unlabelled"))
        use = "they score zero, or are left out where they have no label at all"
        use = "they are ranked and labelled, but not trained on" if name == "train" else use
        note(repeated, f"{repeated:,} labels of {name} occur twice; each counts once")
        note(mended, f"{mended:,} {name} queries {surrogates}")
        note(unlabelled, f"{unlabelled:,} of {split['queries']:,} {name} queries have no positive; {use}")
    missing = [s for s in ("dev", "test") if s not in source.splits]
    note(len(missing), f"no {' and no '.join(missing)} split; it is left out of the evaluation")


def _report_shared(splits: dict[str, _Split]) -> None:
    """Says which queries of dev and test are training queries, too: their measures flatter the student."""
    trained = {row.query_id for row in splits["train"].labels} if "train" in splits else set()
    for name in splits.keys() - {"train"}:
        shared = len(trained.intersection(splits[name].ids))
        if shared:
            say(f"collection: {shared:,} of {len(splits[name].ids):,} {name} queries are training queries, too")
