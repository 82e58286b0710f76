"""Import the scores of a file into the parts that training reads.

The rows of the file are streamed into spill files by query, and each spill file is sorted in memory. So memory holds a
block of rows, one spill file, the ids of the training queries, and 16 bytes a passage.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.ipc as ipc

from ckd_ray.arrays import Int64Array
from ckd_ray.cross_encoder.candidates import CandidateReader
from ckd_ray.cross_encoder.score_rows import read_scores
from ckd_ray.cross_encoder.scores import write_scores
from ckd_ray.data import Collection
from ckd_ray.data.collection import passage_ids_file
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.errors import UserError
from ckd_ray.files import filesystem_of, is_local, make_folder
from ckd_ray.progress import Progress, say
from ckd_ray.ray_util.parts import query_spans

_MOST_SPILLS = 256
_ROW = np.dtype([("query", "<i4"), ("passage", "<i4"), ("score", "<f4"), ("line", "<i8")])


@dataclass
class Coverage:
    """Counts of the imported scores, and how many of the pairs that training reads have one."""

    pairs: int = 0
    queries: int = 0
    labelled: list[int] = field(default_factory=lambda: [0, 0])  # pairs with a score, all pairs
    negatives: list[int] = field(default_factory=lambda: [0, 0])
    skipped: int = 0
    repeated: int = 0

    def figures(self) -> dict[str, int | float]:
        """For the manifest: counts, and the shares of labelled passages and of hard negatives that have a score."""
        return {
            "pairs": self.pairs,
            "scored_queries": self.queries,
            "labelled_scored": round(self.labelled[0] / max(1, self.labelled[1]), 4),
            "negatives_scored": round(self.negatives[0] / max(1, self.negatives[1]), 4),
            "unknown_skipped": self.skipped,
            "repeated": self.repeated,
        }


def import_scores(uri: str, out: str, candidates: CandidateReader, run: str) -> tuple[int, Coverage]:
    """Check the file `uri` and write its scores as parts into `out`.

    An unknown id is an error, except that rows of unknown passages are counted and left out where `collection.limit`
    has cut the corpus. A repeated pair counts once; with two different scores it is an error.

    Returns:
        The number of queries a part, and the coverage.

    Raises:
        InputError: with file and line, up to twenty problems at once.
        UserError: the file cannot be read, or scores no candidate at all.
    """
    make_folder(out)
    collection, problems = Collection.open(run), Problems(of="the scores")
    queries = collection.queries("train").ids
    spans, coverage = query_spans(len(queries)), Coverage()
    size = spans[0][1]
    # The disk of a local run has room for the spill files.
    disk = os.path.dirname(filesystem_of(out)[1]) if is_local(out) else None
    with tempfile.TemporaryDirectory(prefix="ckd-ray-scores-", dir=disk) as scratch:
        spills = _Spills(scratch, len(spans), size)
        _spread(uri, problems, spills, collection, coverage)
        problems.check()
        with Progress("cross_encoder", len(queries), "queries") as progress:
            for part, (first, stop) in enumerate(spans):
                found = spills.read(part)
                rows = _unique(uri, found, problems, queries, collection)
                coverage.repeated += len(found) - len(rows)
                _count(coverage, rows, first, stop, candidates)
                if not problems.lines:
                    groups = _by_query(rows, first, stop)
                    write_scores(
                        out,
                        "train",
                        part,
                        query_ids=queries[first:stop],
                        passages=[group["passage"].astype(np.int64) for group in groups],
                        scores=[group["score"] for group in groups],
                        passage_ids=collection.passage_ids(rows["passage"].astype(np.int64)),
                    )
                progress.advance(stop - first)
    problems.check()
    _report(uri, coverage)
    return size, coverage


class _Spills:
    """Rows of consecutive parts in at most `_MOST_SPILLS` files; the file that was read last stays in memory."""

    def __init__(self, folder: str, parts: int, queries_per_part: int) -> None:
        self.folder, self.queries_per_part = folder, queries_per_part
        self._parts_each = -(-parts // _MOST_SPILLS)
        self._held: tuple[int, npt.NDArray[np.void]] | None = None

    def append(self, rows: npt.NDArray[np.void]) -> None:
        which = rows["query"] // (self.queries_per_part * self._parts_each)
        order = np.argsort(which, kind="stable")
        rows, which = rows[order], which[order]
        cuts = np.flatnonzero(np.diff(which)) + 1
        for group in np.split(rows, cuts) if len(rows) else []:
            name = int(group["query"][0]) // (self.queries_per_part * self._parts_each)
            with open(os.path.join(self.folder, f"{name}.rows"), "ab") as file:
                file.write(group.tobytes())

    def read(self, part: int) -> npt.NDArray[np.void]:
        """The rows of a part, by query, passage and line."""
        name = part // self._parts_each
        if self._held is None or self._held[0] != name:
            path = os.path.join(self.folder, f"{name}.rows")
            rows = np.fromfile(path, _ROW) if os.path.exists(path) else np.empty(0, _ROW)
            self._held = (name, np.sort(rows, order=["query", "passage", "line"], kind="stable"))
        rows = self._held[1]
        low, high = np.searchsorted(rows["query"], np.array([part, part + 1]) * self.queries_per_part)
        return rows[low:high]


class PassageIndex:
    """The dense indices of passages by their ids or texts: found by 8-byte hashes, and confirmed by comparing the ids
    or texts themselves. Of several passages with the same text, the first is found.

    Args:
        names: of all passages, in blocks.
        read: the names of passages by their indices.
    """

    def __init__(self, names: Iterable[list[str]], read: Callable[[Int64Array], list[str]]) -> None:
        self._read = read
        flat = np.concatenate([np.empty(0, np.uint64), *map(_hashes, names)])
        self._order = np.argsort(flat, kind="stable")
        self._hashes = flat[self._order]

    @classmethod
    def of_ids(cls, collection: Collection) -> PassageIndex:
        """By the ids of the input."""
        fs, path = filesystem_of(passage_ids_file(collection.run))
        with fs.open_input_file(path) as file:
            reader = ipc.open_file(file)
            batches = (reader.get_batch(i)["passage_id"].to_pylist() for i in range(reader.num_record_batches))
            return cls(batches, collection.passage_ids)

    @classmethod
    def of_texts(cls, collection: Collection) -> PassageIndex:
        """By their texts."""
        return cls((texts for _, texts in collection.text_blocks()), collection.texts)

    def find(self, names: list[str]) -> Int64Array:
        """The index of each name; -1 for one that is not in the corpus."""
        wanted = _hashes(names)
        found = np.full(len(names), -1, np.int64)
        at = np.searchsorted(self._hashes, wanted)
        left = np.arange(len(names))
        while len(left):  # a second round only where two names of the corpus share a hash
            left = left[at[left] < len(self._hashes)]
            left = left[self._hashes[at[left]] == wanted[left]]
            index = self._order[at[left]]
            same = np.array([names[i] == name for i, name in zip(left.tolist(), self._read(index), strict=True)], bool)
            found[left[same]] = index[same]
            left = left[~same]
            at[left] += 1
        return found


def _hashes(names: list[str]) -> npt.NDArray[np.uint64]:
    return np.asarray(pd.util.hash_array(np.array(names, object), categorize=False), np.uint64)


@dataclass(frozen=True)
class _Known:
    """The passages and the training queries, by ids or by texts."""

    passages: PassageIndex
    queries: dict[str, list[int]]  # several where they share a text

    @classmethod
    def of(cls, collection: Collection, by_text: bool) -> _Known:
        split = collection.queries("train")
        queries: dict[str, list[int]] = {}
        for i, name in enumerate(split.texts if by_text else split.ids):
            queries.setdefault(name, []).append(i)
        passages = PassageIndex.of_texts(collection) if by_text else PassageIndex.of_ids(collection)
        return cls(passages, queries)


def _spread(uri: str, problems: Problems, spills: _Spills, collection: Collection, coverage: Coverage) -> None:
    limited = collection.manifest.get("limit") is not None
    known: _Known | None = None
    for block in read_scores(uri, problems):
        known = known or _Known.of(collection, block.by_text)
        noun = "the text" if block.by_text else "an id"
        queries = [known.queries.get(name, []) for name in block.query_ids]
        passages = known.passages.find(block.passage_ids)
        counts = np.fromiter(map(len, queries), np.int64, len(queries))
        checks = [("query", block.query_ids, counts == 0, f"{noun} of the training queries")]
        checks += [] if limited else [("passage", block.passage_ids, passages < 0, f"{noun} of the corpus")]
        for what, names, wrong, expected in checks:
            for i in np.flatnonzero(wrong).tolist():
                where, problem = f"{uri}:{block.lines[i]}", f"a score of an unknown {what}"
                problems.add(where, problem, expected=expected, found=shorten(names[i]))
        counts[passages < 0] = 0
        coverage.skipped += int((counts == 0).sum())
        rows = np.empty(int(counts.sum()), _ROW)
        rows["query"] = [q for of_query, count in zip(queries, counts.tolist(), strict=True) if count for q in of_query]
        rows["passage"], rows["score"] = np.repeat(passages, counts), np.repeat(block.scores, counts)
        rows["line"] = np.repeat(block.lines, counts)
        spills.append(rows)


def _unique(
    uri: str, rows: npt.NDArray[np.void], problems: Problems, queries: list[str], collection: Collection
) -> npt.NDArray[np.void]:
    """The rows without repetitions; a pair with two scores is added to `problems`."""
    pairs = rows[["query", "passage"]]
    again = np.flatnonzero(pairs[1:] == pairs[:-1]) + 1
    for i in again.tolist():
        if rows["score"][i] != rows["score"][i - 1]:
            name = collection.passage_ids(rows["passage"][i : i + 1])[0]
            problems.add(
                f"{uri}:{rows['line'][i]}",
                f"a second score of query {shorten(queries[rows['query'][i]])} and passage {shorten(name)}",
                expected=f"{rows['score'][i - 1]:g} as at line {rows['line'][i - 1]}",
                found=f"{rows['score'][i]:g}",
            )
    return np.delete(rows, again)


def _by_query(rows: npt.NDArray[np.void], first: int, stop: int) -> list[npt.NDArray[np.void]]:
    return np.split(rows, np.searchsorted(rows["query"], np.arange(first + 1, stop)))


def _count(coverage: Coverage, rows: npt.NDArray[np.void], first: int, stop: int, candidates: CandidateReader) -> None:
    wanted = candidates.read(first, stop)
    coverage.pairs += len(rows)
    for mine, labelled, negatives in zip(_by_query(rows, first, stop), wanted.labelled, wanted.negatives, strict=True):
        coverage.queries += bool(len(mine))
        for count, asked in ((coverage.labelled, labelled), (coverage.negatives, negatives)):
            count[0] += int(np.isin(asked, mine["passage"]).sum())
            count[1] += len(asked)


def _report(uri: str, coverage: Coverage) -> None:
    """Tell the user the coverage, and refuse scores that training cannot use."""
    found = coverage.figures()
    say(
        f"cross_encoder: {coverage.pairs:,} scores of {coverage.queries:,} queries; they cover"
        f" {100 * found['labelled_scored']:.1f} % of the labelled passages and {100 * found['negatives_scored']:.1f} %"
        " of the hard negatives; a pair without a score does not count in training"
    )
    if coverage.repeated:
        say(f"cross_encoder: {coverage.repeated:,} scores are repeated; each counts once")
    if coverage.skipped:
        say(f"cross_encoder: {coverage.skipped:,} scores are of passages beyond collection.limit")
    if not coverage.negatives[0]:
        raise UserError(
            "these scores are of no use: no training query has a score for any of its hard negatives",
            where=uri,
            expected="scores of the passages that `rankings/` lists, at least for some queries",
            found=f"{coverage.pairs} scores, none of them among the first {coverage.negatives[1]} candidates",
            fix="score the candidates with cross_encoder.model, or set distill.negatives_depth and retrieve.depth"
            " to what the scores were made from",
        )
