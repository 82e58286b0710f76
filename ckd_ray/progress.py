"""One line of progress: how far, how fast, how long still. People's output goes to standard error."""

from __future__ import annotations

import re
import sys
import time
from types import TracebackType
from typing import Any

_quiet = False
# `key:secret` of a URI such as s3://key:secret@bucket/path (the key may be empty), and options such as &token=secret.
_SECRET = re.compile(r"""(?<=://)[^/@\s:"'<>]*:[^@\s"'<>]+(?=@)""")
_SECRET_OPTION = re.compile(
    r"""([?&;][^=?&;\s"'<>]*(?:secret|token|password|passwd|credential|signature|[_-]key|\bkey|\bsig)[^=?&;\s"'<>]*=)"""
    r"""[^&;\s"'<>]+""",
    re.IGNORECASE,
)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*$")
# What a terminal would carry out, or would show in another order than it stands; line ends and tabs are kept.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def set_quiet(quiet: bool) -> None:
    """Switch progress and messages off (`--quiet`)."""
    global _quiet
    _quiet = quiet


def without_secrets(text: str) -> str:
    """`text` with the keys in its URIs hidden, for people and logs."""
    return _SECRET_OPTION.sub(r"\1***", _SECRET.sub("***", text))


def without_keys(value: Any) -> Any:
    """A JSON value whose strings that are URIs have their keys hidden, for records that are passed on; texts and ids
    stay as they are."""
    if isinstance(value, dict):
        return {key: without_keys(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_keys(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) and _URI.match(value) else value


def printable(text: str) -> str:
    """`text` for a terminal or a log: texts and ids come from anywhere, and a control character in one of them would be
    carried out. It becomes a question mark; keys in URIs are hidden."""
    return _CONTROL.sub("?", without_secrets(text))


def say(text: str) -> None:
    """Print one line for people."""
    if not _quiet:
        print(printable(text), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`7.3 s`, `4 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Progress of one stage; a context manager.

    On a terminal the line is rewritten four times a second; elsewhere (a log) a line is printed every ten seconds.

    Args:
        stage: the name in front of the line.
        total: how many units there are; None when that is not known before the end.
        unit: what is counted: `passages`, `queries`, `steps`.
        done: units that an earlier run has finished; they do not count into the rate.
    """

    def __init__(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self._at_start = done
        self.started = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._every = 0.25 if self._terminal else 10.0
        self._shown = self.started
        self.note = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._terminal and not _quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Since the stage began, in this process."""
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Units a second, of this process alone."""
        return (self.done - self._at_start) / max(self.seconds, 1e-9)

    def advance(self, count: int) -> None:
        """`count` more units are done."""
        self.reach(self.done + count)

    def reach(self, done: int, total: int | None = None) -> None:
        """`done` units are finished in all."""
        self.done = done
        self.total = total if total is not None else self.total
        now = time.monotonic()
        if now - self._shown >= self._every and not _quiet:
            self._shown = now
            self._show()

    def _show(self) -> None:
        text = f"{self.stage}: {self.done:,}"
        if self.total:
            text += f" of {self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %)"
            if self.rate > 0 and self.done < self.total:
                text += f", {duration((self.total - self.done) / self.rate)} left"
        else:
            text += f" {self.unit}"
        text += f", {self.rate:,.1f} {self.unit}/s" + (f", {self.note}" if self.note else "")
        end = "" if self._terminal else "\n"
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
