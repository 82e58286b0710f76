"""Which table is the corpus, and which are queries and qrels: by the names of files and columns, then by their ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Literal, TypeVar

from ckd_ray.config.schema import Split
from ckd_ray.errors import UserError
from ckd_ray.init.tables import (
    GRADES,
    IDS,
    PASSAGE_IDS,
    PASSAGE_TEXTS,
    QUERY_IDS,
    QUERY_TEXTS,
    Table,
    is_whole,
    spelled,
)

Role = Literal["corpus", "queries", "qrels"]
_NAMES: dict[Role, set[str]] = {
    "corpus": {"corpus", "collection", "passages", "passage", "documents", "document", "docs", "doc", "articles",
               "answers", "psgs"},
    "queries": {"queries", "query", "questions", "question", "topics", "topic"},
    "qrels": {"qrels", "qrel", "labels", "judgments", "judgements", "relevance", "relevances"},
}  # fmt: skip
_SPLITS: dict[str, Split] = {"train": "train", "training": "train", "dev": "dev", "valid": "dev", "validation": "dev",
                             "val": "dev", "test": "test"}  # fmt: skip
# The share of the labels' ids that a table must hold to be taken for theirs.
_ENOUGH = 0.5


@dataclass(frozen=True)
class Texts:
    """A table of passages or queries, and which columns are read."""

    table: Table
    id: str
    text: str
    title: str | None = None

    @property
    def columns(self) -> list[str]:
        """Id and text, and the title where there is one."""
        return [self.id, self.text, *([self.title] if self.title else [])]


@dataclass(frozen=True)
class Labels:
    """A table of labels. Without a column of grades every label counts 1. `sure`: the names tell query from passage."""

    table: Table
    query: str
    passage: str
    grade: str | None
    sure: bool

    @property
    def columns(self) -> list[str]:
        """The two ids, and the grade where there is one."""
        return [self.query, self.passage, *([self.grade] if self.grade else [])]


@dataclass
class Layout:
    """What was recognised; a file that no split names has the key None.

    Attributes:
        notes: what was assumed, for people.
    """

    corpus: Texts
    queries: dict[Split | None, Texts]
    qrels: dict[Split | None, Labels]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Given:
    """The tables that options name."""

    corpus: Table | None = None
    queries: Sequence[Table] = ()
    qrels: Sequence[Table] = ()


def recognise(tables: Sequence[Table], given: Given) -> Layout:
    """Which table is what.

    Raises:
        UserError: says what was looked for, what is there, and the option that settles it.
    """
    taken = {table.uri for table in (given.corpus, *given.queries, *given.qrels) if table}
    free = [table for table in tables if table.uri not in taken]
    notes: list[str] = []
    qrels = _find_qrels(free, given, notes)
    free = [table for table in free if table not in [labels.table for labels in qrels.values()]]
    corpus, queries = _find_texts(free, given, list(qrels.values()), notes)
    qrels = {key: _oriented(labels, corpus, notes) for key, labels in qrels.items()}
    if len(given.qrels) == 1 and "train" not in qrels:  # the one file has all labels, whatever its name says
        (split,) = qrels
        qrels, queries = {None: qrels[split]}, {None: queries[split]} if split in queries else queries
    return Layout(corpus, queries, qrels, notes)


def role_of(name: str) -> Role | None:
    """By the words in a file's own name, else in that of its folder."""
    for words in _words(name):
        found = [role for role, names in _NAMES.items() if words & names]
        if "qrels" in found or len(found) == 1:
            return "qrels" if "qrels" in found else found[0]
    return None


def split_of(name: str) -> Split | None:
    """The split that a file's name names."""
    return next((_SPLITS[word] for words in _words(name) for word in sorted(words) if word in _SPLITS), None)


def _words(name: str) -> list[set[str]]:
    """The words in each part of a path, from its end."""
    return [set(re.split(r"[^a-z0-9]+", part.lower())) for part in reversed(name.split("/"))]


# -- columns ----------------------------------------------------------------------------------------------------------


def texts_of(table: Table, role: Role) -> Texts | None:
    """The columns of passages or queries; None when the table has no ids or no texts."""
    ids, texts = (PASSAGE_IDS, PASSAGE_TEXTS) if role == "corpus" else (QUERY_IDS, QUERY_TEXTS)
    text = _known(table, texts) or _longest(table)
    others = [column for column in table.columns if column != text]
    alike = [c for c in others if _are_ids(table.values(c), unique=False)]
    unique = [c for c in alike if _are_ids(table.values(c))]
    name = _known(table, (*ids, *IDS), others) or next(iter(unique or alike), None)
    if text is None or name is None:
        return None
    title = _known(table, ("title",), [c for c in others if c != name]) if role == "corpus" else None
    return Texts(table, name, text, title)


def labels_of(table: Table) -> Labels | None:
    """The columns of labels; None when the table has texts, or no two columns of ids."""
    plain = [column for column in table.columns if _are_ids(table.values(column), unique=False)]
    query = _known(table, (*QUERY_IDS, "query"), plain)
    passage = _known(table, (*PASSAGE_IDS, "passage", "document", "doc", "corpus"), plain)
    if query and passage:
        return Labels(table, query, passage, _known(table, GRADES, plain), sure=True)
    if plain != list(table.columns) or len(plain) not in (2, 3, 4):
        return None
    grade = plain[-1] if len(plain) > 2 else None
    if grade and not all(is_whole(value) for value in table.values(grade)):
        return None
    return Labels(table, plain[0], plain[-2] if grade else plain[1], grade, sure=False)


def _known(table: Table, names: Iterable[str], among: Sequence[str] | None = None) -> str | None:
    have = {spelled(column): column for column in reversed(table.columns if among is None else among)}
    return next((have[name] for name in names if name in have), None)


def _longest(table: Table) -> str | None:
    """The column with the longest values, some of which are words with spaces between them."""
    lengths = {column: sum(map(len, table.values(column))) for column in table.columns}
    wordy = [column for column in table.columns if any(" " in value.strip() for value in table.values(column))]
    if wordy or table.header:
        return max(wordy, key=lambda column: lengths[column], default=None)
    return table.columns[-1] if len(table.columns) == 2 else None


def _are_ids(values: Sequence[str], unique: bool = True) -> bool:
    sound = all(value.strip() and " " not in value.strip() for value in values)
    return sound and (not unique or len(set(values)) == len(values))


# -- qrels ------------------------------------------------------------------------------------------------------------


def _find_qrels(tables: Sequence[Table], given: Given, notes: list[str]) -> dict[Split | None, Labels]:
    if given.qrels:
        found = [labels for table in given.qrels if (labels := labels_of(table))]
        if len(found) < len(given.qrels):
            wrong = next(table for table in given.qrels if labels_of(table) is None)
            raise _no_columns("--qrels", wrong, "a query id, a passage id and a grade (a whole number, optional)")
        return _by_split(found, "--qrels", notes)
    found = [labels for table in tables if (labels := labels_of(table))]
    named = [labels for labels in found if role_of(labels.table.name) == "qrels"]
    unnamed = [labels for labels in found if role_of(labels.table.name) is None]
    # A file of ids alone holds labels, also when it is called answers.
    bare = [labels for labels in found if texts_of(labels.table, "corpus") is None]
    chosen = named or [labels for labels in unnamed if labels.sure] or unnamed or bare
    if not chosen:
        raise _nothing(
            "no labels (qrels)",
            "a file whose name holds qrels or labels, with a query id, a passage id and a grade; or columns such as"
            " query_id, passage_id, relevance",
            tables,
            "--qrels FILE names it",
        )
    return _by_split(chosen, "--qrels", notes)


_Kind = TypeVar("_Kind", Texts, Labels)


def _by_split(found: Sequence[_Kind], option: str, notes: list[str]) -> dict[Split | None, _Kind]:
    """One table a split. Of several the one with the plainest name is taken: queries.dev, not queries.dev.small."""
    groups: dict[Split | None, list[_Kind]] = {}
    for one in found:
        groups.setdefault(split_of(one.table.name), []).append(one)
    if len(groups) > 1 and None in groups:
        names = ", ".join(one.table.name for one in groups.pop(None))
        notes.append(f"not used: {names}; other files name their splits ({option} would take it)")
    chosen: dict[Split | None, _Kind] = {}
    for split, some in groups.items():
        fewest = min(len(_words(one.table.name)[0]) for one in some)
        plain = [one for one in some if len(_words(one.table.name)[0]) == fewest]
        if len(plain) > 1:
            raise UserError(
                f"several files may be the {option.removeprefix('--')}" + (f" of {split}" if split else ""),
                where=option,
                expected="one file a split (train, dev or test in its name)",
                found=", ".join(one.table.shown() for one in plain),
                fix=f"name it: {option} {plain[0].table.name}",
            )
        chosen[split] = plain[0]
        if len(some) > 1:
            names = ", ".join(one.table.name for one in some if one is not plain[0])
            notes.append(f"not used: {names}; {plain[0].table.name} has the plainer name ({option} takes another)")
    return chosen


def _oriented(labels: Labels, corpus: Texts, notes: list[str]) -> Labels:
    """Swap the columns of query and passage if they have no names and match the corpus better that way."""
    if labels.sure:
        return labels
    firsts, seconds = ({row[0] for row in labels.table.rows([column])} for column in (labels.query, labels.passage))
    first = second = 0
    for (name,) in corpus.table.rows([corpus.id]):
        first += name in firsts
        second += name in seconds
        if second > _ENOUGH * len(seconds):
            return labels
    if first * len(seconds) <= second * len(firsts):
        return labels
    notes.append(f"{labels.table.name}: column {labels.query} holds the passages, by their ids")
    return replace(labels, query=labels.passage, passage=labels.query)


# -- corpus and queries -----------------------------------------------------------------------------------------------


def _find_texts(
    tables: Sequence[Table], given: Given, qrels: Sequence[Labels], notes: list[str]
) -> tuple[Texts, dict[Split | None, Texts]]:
    corpora = [given.corpus] if given.corpus else [t for t in tables if role_of(t.name) == "corpus"]
    asked = list(given.queries) or [t for t in tables if role_of(t.name) == "queries"]
    rest = [t for t in tables if role_of(t.name) is None and texts_of(t, "corpus")]
    if given.corpus and texts_of(given.corpus, "corpus") is None:
        raise _no_columns("--corpus", given.corpus, "a passage id (without spaces) and a text")
    for table in given.queries:
        if texts_of(table, "queries") is None:
            raise _no_columns("--queries", table, "a query id (without spaces) and a text")
    corpora = [table for table in corpora if texts_of(table, "corpus")]
    asked = [table for table in asked if texts_of(table, "queries")]
    if not corpora and not asked and len(rest) > 1:
        corpus, query = _best_pair(rest, qrels, notes)
        corpora, asked = [corpus], [query]
    elif not corpora:
        corpora = _by_ids(rest, [(labels.table, labels.passage) for labels in qrels], "corpus", notes)
    elif not asked:
        left = [table for table in rest if table not in corpora]
        asked = _by_ids(left, [(labels.table, labels.query) for labels in qrels], "queries", notes)
    if len(corpora) > 1:
        corpora = _by_ids(corpora, [(labels.table, labels.passage) for labels in qrels], "corpus", notes)
    if len(corpora) != 1:
        raise _nothing(
            "no passages (corpus)" if not corpora else "several files may be the corpus",
            "a file whose name holds corpus, collection, passages or documents, with an id and a text; or one that"
            " holds the passage ids of the labels",
            corpora or tables,
            "--corpus FILE names it",
        )
    if not asked:
        raise _nothing(
            "no queries",
            "a file whose name holds queries or questions, with an id and a text; or one that holds the query ids of"
            " the labels",
            tables,
            "--queries FILE names it",
        )
    found = texts_of(corpora[0], "corpus")
    assert found is not None
    return found, _by_split([texts for t in asked if (texts := texts_of(t, "queries"))], "--queries", notes)


def _by_ids(tables: Sequence[Table], labels: Sequence[tuple[Table, str]], role: Role, notes: list[str]) -> list[Table]:
    """The tables that hold ids of the labels: the best one for the corpus, all of them for the queries."""
    wanted = {row[0] for table, column in labels for row in table.rows([column])}
    shares: dict[str, float] = {}
    for table in tables:
        texts = texts_of(table, role)
        ids = {row[0] for row in table.rows([texts.id])} if texts else set()
        # A file of queries of one split holds few of all labels' ids, but its own ids are all among them.
        of = len(wanted) if role == "corpus" else min(len(wanted), len(ids))
        shares[table.uri] = len(ids & wanted) / max(1, of)
    best = max(shares.values(), default=0.0)
    chosen = [t for t in tables if shares[t.uri] > _ENOUGH and (role == "queries" or shares[t.uri] == best)]
    if not chosen and len(tables) == 1:
        chosen = list(tables)
    for table in chosen if len(chosen) < 2 or role == "queries" else ():
        notes.append(f"{role}: {table.name}, which holds {shares[table.uri]:.0%} of the ids in the labels")
    return chosen


def _best_pair(tables: Sequence[Table], qrels: Sequence[Labels], notes: list[str]) -> tuple[Table, Table]:
    """Corpus and queries among files whose names say nothing: the pair whose ids match the labels best; of equals the
    corpus is the larger one."""
    ids = {t.uri: {row[0] for row in t.rows([texts.id])} for t in tables if (texts := texts_of(t, "corpus"))}
    labels = qrels[0]
    names = {column: {row[0] for row in labels.table.rows([column])} for column in (labels.query, labels.passage)}

    def fit(pair: tuple[Table, Table]) -> tuple[float, int]:
        corpus, queries = pair
        ways = [(labels.query, labels.passage), *([] if labels.sure else [(labels.passage, labels.query)])]
        shares = [
            min(len(ids[queries.uri] & names[q]) / len(names[q]), len(ids[corpus.uri] & names[p]) / len(names[p]))
            for q, p in ways
        ]
        return max(shares), len(ids[corpus.uri])

    corpus, queries = best = max(permutations(tables, 2), key=fit)
    if fit(best)[0] <= _ENOUGH:
        raise _nothing(
            "nothing says which file is the corpus and which the queries",
            "names that hold corpus (collection, passages, documents) and queries (questions), or ids that match the"
            f" labels in {labels.table.name}",
            tables,
            "--corpus FILE and --queries FILE name them",
        )
    notes.append(f"corpus: {corpus.name}, and queries: {queries.name}, by the ids in the labels")
    return best


def _nothing(problem: str, expected: str, tables: Sequence[Table], fix: str) -> UserError:
    found = "; ".join(table.shown() for table in tables[:8]) or "no table"
    return UserError(problem, where="DIR", expected=expected, found=found, fix=fix)


def _no_columns(option: str, table: Table, expected: str) -> UserError:
    return UserError("the columns are not recognised", where=option, expected=expected, found=table.shown())
