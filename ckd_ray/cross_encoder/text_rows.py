"""Scores in files that hold texts in the place of ids: FlagEmbedding's lists, and triples with a margin.

    {"query": ..., "pos": [...], "neg": [...], "pos_scores": [...], "neg_scores": [...]}
    {"query": ..., "positive": ..., "negative": ..., "margin": ...}

A margin is the score of the positive minus that of the negative. Training uses only the differences between a query's
scores. So the first positive of a query gets the score 0, and the margins give the scores of all other passages.
"""

from __future__ import annotations

import json
from typing import Any

from ckd_ray.data.problems import Problems, shorten

Row = tuple[str, str, float]
_LISTS = ("pos", "neg", "pos_scores", "neg_scores")
_TRIPLE = ("positive", "negative", "margin")


def has_texts(line: str) -> bool:
    """Whether the line is of one of the two forms."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "query" in row and ("pos" in row or "positive" in row)


class TextLines:
    """Reads the lines of a file in their order, because the margins of a query stand on several consecutive lines."""

    def __init__(self) -> None:
        self._query, self._scores = "", dict[str, float]()

    def __call__(self, where: str, text: str, problems: Problems) -> list[Row]:
        """The (query, passage, score) of a line; what cannot be read is added to `problems`."""
        try:
            row = json.loads(text)
            return self._triple(where, row, problems) if "positive" in row else _lists(row)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            expected = f"an object with query and {', '.join(_LISTS)}, or with query, {', '.join(_TRIPLE)}"
            problems.add(where, "not a row of scores", expected=expected, found=shorten(text))
            return []

    def _triple(self, where: str, row: dict[str, Any], problems: Problems) -> list[Row]:
        query, positive, negative = (_text(row[name]) for name in ("query", "positive", "negative"))
        margin = number(row["margin"])
        if query != self._query:
            self._query, self._scores = query, {}
        known, before = self._scores, set(self._scores)
        if not known:
            known[positive] = 0.0
        if positive in known:
            known.setdefault(negative, known[positive] - margin)
        elif negative in known:
            known[positive] = known[negative] + margin
        else:
            expected = "a positive or a negative that an earlier line of this query has"
            problems.add(where, "a triple apart from the others of its query", expected=expected, found=shorten(query))
        return [(query, passage, score) for passage, score in known.items() if passage not in before]


def _lists(row: dict[str, Any]) -> list[Row]:
    query, rows = _text(row["query"]), []
    for passages, scores in (("pos", "pos_scores"), ("neg", "neg_scores")):
        pairs = zip(row[passages], row[scores], strict=True)
        rows += [(query, _text(passage), number(score)) for passage, score in pairs]
    return rows


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("a text is a string")
    value.encode()  # half a surrogate pair has no UTF-8 form
    return value


def number(value: object) -> float:
    """A score. Raises TypeError when it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a score is a number")
    return float(value)
