"""How large a collection is: counted in its own files, a line at a time, or given in numbers.

While the files stream by, some passages and queries are kept, so that the calibration runs on texts of the collection.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckd_ray.config import CollectionConfig, Config
from ckd_ray.data.problems import Problems
from ckd_ray.data.sources import Source, open_source
from ckd_ray.errors import UserError

_EVALUATED_QUERIES = 1000


@dataclass(frozen=True)
class Sizes:
    """A collection in numbers.

    Attributes:
        queries: by split; labels: judgements of all splits.
        tokens: the encoder's tokens a passage, cut at `model.doc_maxlen`; kept: those of them that the store keeps
            (without punctuation). Both are 0 until the tokenizer has read a sample.
        read_seconds: what reading the source once took here; None when it was not read.
        counted: from the files, not from options.
    """

    passages: int
    queries: dict[str, int]
    labels: int
    tokens: float
    kept: float
    read_seconds: float | None = None
    counted: bool = True

    @property
    def vectors(self) -> float:
        """Token embeddings of the store."""
        return self.passages * self.kept

    @property
    def all_queries(self) -> int:
        """Queries of all splits."""
        return sum(self.queries.values())

    def evaluated(self, config: Config) -> int:
        """Queries of the splits that are evaluated."""
        return sum(self.queries.get(split, 0) for split in config.evaluate.splits)


@dataclass(frozen=True)
class Sample:
    """Texts of some passages and of some queries."""

    passages: list[str]
    queries: list[str]


class _Reservoir:
    """A sample of `most` items without replacement, of a stream whose end is not known (Vitter's algorithm R)."""

    def __init__(self, most: int, seed: int) -> None:
        self.items: list[str] = []
        self.seen, self._most, self._chooser = 0, most, np.random.default_rng(seed)

    def add(self, item: str) -> None:
        self.seen += 1
        if len(self.items) < self._most:
            self.items.append(item)
        elif (place := int(self._chooser.integers(self.seen))) < self._most:
            self.items[place] = item


def count_collection(
    settings: CollectionConfig, *, passages: int, queries: int, seed: int = 17
) -> tuple[Sizes, Sample]:
    """Count a collection by streaming it, and keep a sample.

    Args:
        passages, queries: how many texts of each the sample has, where the collection has so many.

    Raises:
        UserError: a file is missing or cannot be read.
        InputError: lines are malformed (as the collection stage would say).
    """
    started = time.perf_counter()
    source, problems = open_source(settings), Problems()
    texts, asked = _Reservoir(passages, seed), _Reservoir(queries, seed)
    counts, labels, labelled = _count_queries(source, problems, asked)
    problems.check()
    room = None if settings.limit is None else max(0, settings.limit - len(labelled))
    others = 0
    for row in source.passages(problems):
        if room is not None and row.id not in labelled:
            others += 1
            if others > room:
                continue
        texts.add(row.text)
    problems.check()
    if not texts.seen:
        raise UserError("no passages", where="collection", expected="at least one")
    sizes = Sizes(texts.seen, counts, labels, 0.0, 0.0, time.perf_counter() - started)
    return sizes, Sample(texts.items, asked.items or ["a query"])


def _count_queries(source: Source, problems: Problems, asked: _Reservoir) -> tuple[dict[str, int], int, set[str]]:
    """Queries by split, the number of labels, and the labelled passages."""
    counts, labels, labelled = {}, 0, set()
    for split in source.splits:
        named = set()
        for label in source.qrels(split, problems):
            labels += 1
            named.add(label.query_id)
            labelled.add(label.passage_id)
        counts[split] = 0
        for row in source.queries(split, problems):
            if row.id in named or not source.shared_queries:
                counts[split] += 1
                asked.add(row.text)
    return counts, labels, labelled


@dataclass(frozen=True)
class GivenSizes:
    """`--passages`, `--queries`, `--tokens-per-passage`; all None when the collection is to be counted. evaluated:
    `--eval-queries`, with the others only."""

    passages: int | None = None
    queries: int | None = None
    tokens: float | None = None
    evaluated: int | None = None

    def sizes(self, config: Config) -> Sizes | None:
        """The collection that they describe: one label a query, every token stored. None when nothing is given.

        Raises:
            UserError: some are given and some are not, or a number cannot be.
        """
        given = {"--passages": self.passages, "--queries": self.queries, "--tokens-per-passage": self.tokens}
        missing = [option for option, value in given.items() if value is None]
        if missing and (len(missing) < len(given) or self.evaluated is not None):
            expected, found = ", ".join(given), f"no {' and no '.join(missing)}"
            raise UserError("sizes come together", where=missing[0], expected=expected, found=found)
        if self.passages is None or self.queries is None or self.tokens is None:
            return None
        for option, value in {**given, "--eval-queries": self.evaluated}.items():
            if value is not None and value <= 0:
                raise UserError("must be positive", where=option, expected="> 0", found=f"{value:g}")
        if self.tokens > config.model.doc_maxlen:
            raise UserError(
                "longer than the encoder reads",
                where="--tokens-per-passage",
                expected=f"at most model.doc_maxlen ({config.model.doc_maxlen})",
                found=f"{self.tokens:g}",
            )
        each = min(self.queries, _EVALUATED_QUERIES) if self.evaluated is None else self.evaluated
        counts: dict[str, int] = {"train": self.queries, **dict.fromkeys(config.evaluate.splits, each)}
        return Sizes(self.passages, counts, sum(counts.values()), self.tokens, self.tokens, None, counted=False)


def synthetic_sample(words: Sequence[str], tokens: float, longest: int, passages: int, queries: int) -> Sample:
    """Texts of single-token words, for a collection that is not here: lengths vary by a half around the mean."""
    chooser = np.random.default_rng(17)
    lengths = np.clip(tokens * chooser.uniform(0.5, 1.5, passages), 6, longest).round().astype(int) - 3
    texts = [" ".join(chooser.choice(words, length)) for length in lengths]
    return Sample(texts, [" ".join(chooser.choice(words, 6)) for _ in range(queries)])
