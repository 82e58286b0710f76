"""One line of progress: how far, how fast, how long still. People's output goes to standard error."""

from __future__ import annotations

import re
import sys
import time
from types import TracebackType

_quiet = False
# `key:secret` of a URI such as s3://key:secret@bucket/path.
_SECRET = re.compile(r"""(?<=://)[^/@\s:]+:[^@\s"']+(?=@)""")


def set_quiet(quiet: bool) -> None:
    """Switch progress and messages off (`--quiet`)."""
    global _quiet
    _quiet = quiet


def without_secrets(text: str) -> str:
    """`text` with the keys in its URIs hidden, for people and logs."""
    return _SECRET.sub("***", text)


def say(text: str) -> None:
    """Print one line for people."""
    if not _quiet:
        print(without_secrets(text), file=sys.stderr, flush=True)


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
