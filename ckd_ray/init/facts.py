"""Everything that the recognised tables hold: queries, labels, and counts of the passages."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ckd_ray.config.schema import Split
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.data.sources import SPLITS
from ckd_ray.errors import UserError
from ckd_ray.init.roles import Labels, Layout, Texts
from ckd_ray.init.tables import is_whole

_MEASURED = 100_000  # passages whose length in words is taken
_EXAMPLES = 3


@dataclass(frozen=True)
class Label:
    """One row of the qrels."""

    query: str
    passage: str
    grade: int


@dataclass
class Part:
    """A split.

    Attributes:
        queries: id to text.
        own_queries, own_labels: the files hold this and nothing else, so that they can be read as they are.
    """

    queries: dict[str, str]
    labels: list[Label]
    own_queries: bool
    own_labels: bool
    texts: Texts
    qrels: Labels


@dataclass
class Facts:
    """What was counted.

    Attributes:
        words: median and 95th percentile of the words of a passage, of the first 100,000.
        unknown: labels left out, by what is not found (`query`, `passage`), with examples.
        grades: how often each grade occurs.
        blank: queries without text of each split, which are left out.
    """

    passages: int = 0
    empty: int = 0
    repeated: int = 0
    words: tuple[int, int] = (0, 0)
    parts: dict[Split, Part] = field(default_factory=dict)
    unknown: dict[str, list[str]] = field(default_factory=dict)
    unknown_count: Counter[str] = field(default_factory=Counter)
    labels: int = 0
    grades: Counter[int] = field(default_factory=Counter)
    blank: Counter[str] = field(default_factory=Counter)


def same_text(text: str) -> str:
    """Texts that differ in case and spaces alone become one."""
    return " ".join(text.casefold().split())


def texts_in(texts: Texts) -> Iterator[tuple[str, str]]:
    """(id, text) of every row, with the title in front of the text."""
    for name, text, *title in texts.table.rows(texts.columns):
        yield name, f"{title[0]} {text}".strip() if title and title[0] else text


def gather(layout: Layout) -> Facts:
    """Read all tables. Labels whose query or passage is unknown are left out and counted.

    Raises:
        UserError: an id occurs twice, a grade is no whole number, or most labels match nothing.
    """
    facts = Facts()
    labels = {key: _labels(qrels) for key, qrels in layout.qrels.items()}
    queries = {key: _queries(texts) for key, texts in layout.queries.items()}
    wanted = {label.passage for some in labels.values() for label in some}
    known = _read_corpus(layout.corpus, wanted, facts)
    facts.labels = sum(map(len, labels.values()))
    facts.grades = Counter(label.grade for some in labels.values() for label in some)
    asked = {name for some in queries.values() for name in some}
    for some in labels.values():
        for label in some:
            _note_unknown(facts, "query", label.query, asked)
            _note_unknown(facts, "passage", label.passage, known)
    for what in ("query", "passage"):
        if facts.unknown_count[what] > 0.5 * facts.labels:
            _raise_unknown(facts, what, layout, queries)
    facts.parts = _parts(facts, layout, labels, queries, known)
    return facts


def _labels(qrels: Labels) -> list[Label]:
    problems = Problems(of=qrels.table.name)
    found: dict[tuple[str, str], Label] = {}
    for number, (query, passage, *rest) in enumerate(qrels.table.rows(qrels.columns), 1):
        where, grade = f"{qrels.table.name}: row {number}", rest[0] if rest else "1"
        if not is_whole(grade):
            problems.add(where, "the grade is not a whole number", expected="an integer", found=shorten(grade))
            continue
        label = Label(query, passage, int(float(grade)))
        before = found.setdefault((query, passage), label)
        if before.grade != label.grade:
            expected, found_ = f"{before.grade} as in an earlier row", str(label.grade)
            problems.add(where, "a second grade for the same query and passage", expected=expected, found=found_)
    problems.check()
    return list(found.values())


def _queries(texts: Texts) -> dict[str, str]:
    problems = Problems(of=texts.table.name)
    found: dict[str, str] = {}
    for number, (name, text) in enumerate(texts_in(texts), 1):
        where = f"{texts.table.name}: row {number}"
        if not name.strip():
            problems.add(where, "an empty query id", expected="an id", found=shorten(name))
        elif name in found:
            problems.add(where, "a duplicate query id", expected="unique ids", found=shorten(name))
        found[name] = text
    problems.check()
    return found


def _read_corpus(corpus: Texts, wanted: set[str], facts: Facts) -> set[str]:
    """Counts the passages. Returns the ids of `wanted` that are there. Memory holds 16 bytes a passage."""
    ids, texts, words = array("q"), array("q"), array("l")
    known: set[str] = set()
    for name, text in texts_in(corpus):
        ids.append(hash(name))
        texts.append(hash(same_text(text)))
        facts.empty += not text.strip()
        if name in wanted:
            known.add(name)
        if len(words) < _MEASURED:
            words.append(len(text.split()))
    facts.passages = len(ids)
    values, counts = np.unique(np.frombuffer(ids, np.int64), return_counts=True)
    if len(values) < len(ids):
        _raise_twice(corpus, set(values[counts > 1].tolist()))
    facts.repeated = len(texts) - len(np.unique(np.frombuffer(texts, np.int64)))
    facts.words = (int(np.median(words)), int(np.quantile(words, 0.95)))
    return known


def _raise_twice(corpus: Texts, hashes: set[int]) -> None:
    problems = Problems(of=corpus.table.name)
    first: dict[str, int] = {}
    for number, (name, _) in enumerate(texts_in(corpus), 1):
        if hash(name) in hashes and first.setdefault(name, number) != number:
            where, found = f"{corpus.table.name}: row {number}", f"{shorten(name)}, also in row {first[name]}"
            problems.add(where, "a duplicate passage id", expected="unique ids", found=found)
    problems.check()


def _note_unknown(facts: Facts, what: str, name: str, known: set[str]) -> None:
    if name not in known:
        facts.unknown_count[what] += 1
        examples = facts.unknown.setdefault(what, [])
        if len(examples) < _EXAMPLES and name not in examples:
            examples.append(name)


def _raise_unknown(facts: Facts, what: str, layout: Layout, queries: dict[Split | None, dict[str, str]]) -> None:
    if what == "passage":
        texts, option = [layout.corpus], "--corpus FILE"
        have = layout.corpus.table.values(layout.corpus.id)
    else:
        texts, option = list(layout.queries.values()), "--queries FILE"
        have = [name for some in queries.values() for name in some][:200]
    where = ", ".join(one.table.name for one in texts)
    labels = ", ".join(dict.fromkeys(qrels.table.name for qrels in layout.qrels.values()))
    raise UserError(
        f"{facts.unknown_count[what]:,} of {facts.labels:,} labels name a {what} that is not there",
        where=labels,
        expected=f"{what} ids of {where}, such as {', '.join(map(repr, have[:_EXAMPLES]))}",
        found=", ".join(map(repr, facts.unknown[what])),
        fix=_almost(facts.unknown[what], have, what)
        or f"let both files spell the ids in the same way, or name another file with {option} or --qrels FILE",
    )


def _almost(unknown: list[str], have: list[str], what: str) -> str | None:
    """What would make the ids match, as far as the examples show it."""
    changes = {
        "one side has .0 at the end, as pandas writes a column of numbers with gaps": lambda s: s.removesuffix(".0"),
        "spaces or capital letters differ": lambda s: s.strip().casefold(),
        "a prefix or leading zeros are missing on one side": lambda s: re.sub(r"^\D*0*", "", s),
    }
    for reason, change in changes.items():
        if any(change(a) and change(a) == change(b) for a in unknown for b in have):
            return f"{reason}: let both files spell the {what} ids in the same way"
    return None


def _parts(
    facts: Facts,
    layout: Layout,
    labels: dict[Split | None, list[Label]],
    queries: dict[Split | None, dict[str, str]],
    known: set[str],
) -> dict[Split, Part]:
    """Queries and labels of each split. Where no file names a split, everything is train."""
    splits: list[Split] = [split for split in SPLITS if split in labels]
    if not splits:
        splits = [split for split in SPLITS if split in queries] or ["train"]
    parts: dict[Split, Part] = {}
    for split in splits:
        texts = queries.get(split, queries.get(None))
        if texts is None:
            raise UserError(
                f"no queries of split {split}",
                where="DIR",
                expected=f"a file of queries with {split} in its name, as the labels have one; or one file for all",
                found=", ".join(one.table.shown() for one in layout.queries.values()),
                fix="--queries FILE names it",
            )
        blank = {name for name, text in texts.items() if not text.strip()}
        facts.blank[split] = len(blank)
        given = labels.get(split, labels.get(None, []))
        texts = {name: text for name, text in texts.items() if name not in blank}
        kept = [label for label in given if label.query in texts and label.passage in known]
        own = split in queries or (len(splits) == 1 and None in queries)
        own &= not blank
        if not own:
            labelled = {label.query for label in kept}
            texts = {name: text for name, text in texts.items() if name in labelled}
        qrels = layout.qrels[split if split in labels else None]
        source = layout.queries[split if split in queries else None]
        parts[split] = Part(texts, kept, own, len(kept) == len(given), source, qrels)
    if "train" not in parts:
        only = ", ".join(one.table.name for one in layout.qrels.values())
        raise UserError(
            "no split to train on",
            where="DIR",
            expected="labels with train in the name of their file, or without any split",
            found=only,
            fix="--qrels FILE takes the queries of this one file for training, and sets dev and test aside from them",
        )
    return parts
