"""How large a collection is: counted in its own files, a line at a time, or given in numbers.

While the files stream by, a few queries with their labelled passages and a few other passages are kept, so that what is
measured on them has the collection's own lengths.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ckd_ray.config import CollectionConfig, Config
from ckd_ray.data.problems import Problems
from ckd_ray.data.sources import Source, open_source
from ckd_ray.errors import UserError

# Of English text in WordPiece, with the space behind it: for collections that are given in numbers only.
BYTES_A_TOKEN = 4.7
_DEV_QUERIES = 1000


@dataclass(frozen=True)
class Sizes:
    """A collection in numbers.

    Attributes:
        queries: by split; labels: judgements of all splits.
        tokens: the encoder's tokens a passage, cut at `model.doc_maxlen`; kept: those of them that the store keeps
            (without punctuation).
        text_bytes: a passage, in UTF-8.
        read_seconds: what reading the source once took here; None when it was not read.
        counted: from the files, not from options.
    """

    passages: int
    queries: dict[str, int]
    labels: int
    tokens: float
    kept: float
    text_bytes: float
    read_seconds: float | None = None
    counted: bool = True

    @property
    def vectors(self) -> float:
        """Token embeddings of the store."""
        return self.passages * self.kept

    @property
    def all_queries(self) -> int:
        """Of all splits."""
        return sum(self.queries.values())


@dataclass
class Sample:
    """Some texts of a collection: (id, text) of passages and training queries, and (query id, passage id) labels."""

    passages: list[tuple[str, str]] = field(default_factory=list)
    queries: list[tuple[str, str]] = field(default_factory=list)
    labels: list[tuple[str, str]] = field(default_factory=list)


def count_collection(
    settings: CollectionConfig, *, passages: int, queries: int, seed: int = 17
) -> tuple[Sizes, Sample]:
    """Count a collection by streaming it, and keep a sample. `tokens` and `kept` are left at 0 for the tokenizer.

    Args:
        passages, queries: how many of each the sample should have.

    Raises:
        UserError: a file is missing or cannot be read.
        InputError: lines are malformed (as the collection stage would say).
    """
    started = time.perf_counter()
    source, problems = open_source(settings), Problems()
    chooser = np.random.default_rng(seed)
    counts, labels, sample = _count_queries(source, problems, queries, chooser)
    problems.check()
    wanted = {passage for _, passage in sample.labels}
    labelled: set[str] = set()
    if settings.limit is not None:
        labelled = {row.passage_id for split in source.splits for row in source.qrels(split, problems)}
    total = others = size = 0
    found: list[tuple[str, str]] = []
    reservoir: list[tuple[str, str]] = []
    for row in source.passages(problems):
        if settings.limit is not None and row.id not in labelled:
            others += 1
            if others > max(0, settings.limit - len(labelled)):
                continue
        total += 1
        size += len(row.text)
        if row.id in wanted:
            found.append((row.id, row.text))
        _keep(reservoir, (row.id, row.text), total, passages, chooser)
    problems.check()
    if not total:
        raise UserError("no passages", where="collection", expected="at least one")
    sample.passages = list(dict([*found, *reservoir]).items())
    here = {name for name, _ in sample.passages}
    sample.labels = [label for label in sample.labels if label[1] in here]
    # Characters for bytes: the same in English, and only the corpus' own files follow from it.
    sizes = Sizes(total, counts, labels, 0.0, 0.0, size / total, time.perf_counter() - started)
    return sizes, sample


def _count_queries(
    source: Source, problems: Problems, most: int, chooser: np.random.Generator
) -> tuple[dict[str, int], int, Sample]:
    """Queries by split, labels of all, and a sample of training queries with their labels."""
    counts: dict[str, int] = {}
    total, sample = 0, Sample()
    for split in source.splits:
        pairs = ((row.query_id, row.passage_id) for row in source.qrels(split, problems))
        labelled: set[str] = set()
        kept: list[tuple[str, str]] = []
        for number, pair in enumerate(pairs, 1):
            total += 1
            if source.shared_queries:
                labelled.add(pair[0])
            if split == "train":
                _keep(kept, pair, number, most, chooser)
        counts[split] = 0
        asked = {query for query, _ in kept}
        for row in source.queries(split, problems):
            if source.shared_queries and row.id not in labelled:
                continue
            counts[split] += 1
            if row.id in asked:
                sample.queries.append((row.id, row.text))
        if split == "train":
            sample.labels = kept
    return counts, total, sample


def _keep(
    reservoir: list[tuple[str, str]], item: tuple[str, str], number: int, most: int, chooser: np.random.Generator
) -> None:
    """A sample of `most` items without replacement, of a stream whose end is not known (Vitter's algorithm R)."""
    if len(reservoir) < most:
        reservoir.append(item)
    else:
        place = int(chooser.integers(number))
        if place < most:
            reservoir[place] = item


def given_sizes(passages: int, queries: int, tokens: float, config: Config, evaluated: int | None = None) -> Sizes:
    """Sizes from options: one label a query, every token stored.

    Args:
        evaluated: queries of each split that is evaluated; at most 1,000 when None.

    Raises:
        UserError: a number that cannot be.
    """
    given = (("--passages", passages), ("--queries", queries), ("--tokens-per-passage", tokens))
    for option, value in (*given, *((("--eval-queries", evaluated),) if evaluated is not None else ())):
        if value <= 0:
            raise UserError("must be positive", where=option, expected="> 0", found=f"{value:g}")
    if tokens > config.model.doc_maxlen:
        raise UserError(
            "longer than the encoder reads",
            where="--tokens-per-passage",
            expected=f"at most model.doc_maxlen ({config.model.doc_maxlen})",
            found=f"{tokens:g}",
        )
    counts: dict[str, int] = {"train": queries}
    each = min(queries, _DEV_QUERIES) if evaluated is None else evaluated
    counts |= dict.fromkeys(config.evaluate.splits, each)
    text = tokens * BYTES_A_TOKEN
    return Sizes(passages, counts, sum(counts.values()), tokens, tokens, text, None, counted=False)


def made_up_sample(words: Sequence[str], tokens: float, longest: int, passages: int, queries: int) -> Sample:
    """Texts of single-token words, where the collection is not at hand: lengths vary by a half around the mean."""
    chooser = np.random.default_rng(17)
    texts = []
    for i in range(passages):
        length = max(3, min(longest - 3, round(tokens * float(chooser.uniform(0.5, 1.5))) - 3))
        texts.append((f"p{i}", " ".join(chooser.choice(words, length))))
    asked = [(f"q{i}", " ".join(chooser.choice(words, 6))) for i in range(queries)]
    labels = [(f"q{i}", f"p{i % passages}") for i in range(queries)]
    return Sample(texts, asked, labels)


def with_tokens(sizes: Sizes, tokens: float, kept: float) -> Sizes:
    """The sizes with what the tokenizer made of a sample."""
    return replace(sizes, tokens=tokens, kept=kept)
