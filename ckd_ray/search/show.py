"""Hits for people: the part of each passage that matches the query's words, with these marked."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from ckd_ray.search.searcher import Hit

Span = tuple[int, int]
_BOLD, _PLAIN = "\x1b[1;33m", "\x1b[0m"
# A terminal would execute control characters in a passage.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def marked_spans(hit: Hit) -> list[Span]:
    """The characters of the matches, in order; adjacent and overlapping spans are merged."""
    joined: list[Span] = []
    for start, end in sorted({(m.start, m.end) for m in hit.matches if m.end > m.start}):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def window(text: str, spans: Sequence[Span], width: int) -> Span:
    """The `width` characters of `text` with the most marked spans, adjusted to whole words."""
    if len(text) <= width:
        return 0, len(text)
    starts = [0, *(max(0, start - 20) for start, _ in spans)]
    start = max(starts, key=lambda s: (sum(s <= a and b <= s + width for a, b in spans), -s))
    start = min(start, len(text) - width)
    stop = start + width
    if start:
        space = text.find(" ", start, start + 20)
        start = space + 1 if space >= 0 and not any(a < space + 1 and b > start for a, b in spans) else start
    if stop < len(text):
        space = text.rfind(" ", stop - 20, stop)
        stop = space if space > start else stop
    return start, stop


def render_hit(hit: Hit, *, colour: bool, columns: int = 100, width: int = 400) -> str:
    """A hit: a line with rank, id and score, then the indented text. Matches are marked by colour or [brackets]."""
    spans = marked_spans(hit)
    first, last = window(hit.text, spans, width)
    pieces, position = ["... " if first else ""], first
    # Marks are single private characters during the wrapping, so that escape codes do not count as width.
    for start, end in spans:
        if start < first or end > last:
            continue
        pieces += [hit.text[position:start], "\ue000", hit.text[start:end], "\ue001"]
        position = end
    pieces += [hit.text[position:last], " ..." if last < len(hit.text) else ""]
    clean = _CONTROL.sub(" ", "".join(pieces))
    lines = textwrap.wrap(clean, max(20, columns - 6)) or ["(no text)"]
    opening, closing = (_BOLD, _PLAIN) if colour else ("[", "]")
    body = "\n".join(f"      {line}" for line in lines).replace("\ue000", opening).replace("\ue001", closing)
    return f"{hit.rank:>4}  {_CONTROL.sub(' ', hit.passage_id)}  {hit.score:.3f}\n{body}"


def effort(tokens: int, size: int) -> str | None:
    """The cost of a query on a large store; None for a store that is fast to read."""
    if tokens < 8_000_000:
        return None
    return (
        f"every query reads the whole store: {tokens:,} token embeddings, {size / 2**30:,.1f} GiB, about"
        f" {tokens / 8e6:,.0f} s on two cores when memory holds them; --index makes an index, once, and a query then"
        " takes about a tenth of a second"
    )
