"""Lines for people: messages without secrets, and the progress of a stage. They go to standard error."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

from ckd_ray.streams import columns, erased, may_rewrite, people

_PRINT_EVERY_S, _REWRITE_EVERY_S = 10.0, 0.5
_NOTEBOOK_EVERY_S = 2.0  # a notebook's file keeps every line that was rewritten
_quiet = False
_open: list[Progress] = []
_moved = 0.0
# `key:secret` of a URI such as s3://key:secret@bucket/path (the key may be empty), and options such as &token=secret.
_SECRET = re.compile(r"""(?<=://)[^/@\s:"'<>]*:[^@\s"'<>]+(?=@)""")
_SECRET_OPTION = re.compile(
    r"""([?&;][^=?&;\s"'<>]*(?:secret|token|password|passwd|credential|signature|[_-]key|\bkey|\bsig)[^=?&;\s"'<>]*=)"""
    r"""[^&;\s"'<>]+""",
    re.IGNORECASE,
)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*$")
# Characters that a terminal would act on, or that change the order of a line; line ends and tabs are kept.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def set_quiet(quiet: bool) -> None:
    """Switch progress and messages off (`--quiet`)."""
    global _quiet
    _quiet = quiet


def without_secrets(text: str) -> str:
    """`text` with the keys in its URIs hidden."""
    return _SECRET_OPTION.sub(r"\1***", _SECRET.sub("***", text))


def without_keys(value: Any) -> Any:
    """A JSON value in which the keys of URIs are hidden; strings that are no URIs stay as they are."""
    if isinstance(value, dict):
        return {key: without_keys(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_keys(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) and _URI.match(value) else value


def printable(text: str) -> str:
    """`text` for a terminal or a log: control characters, which a passage or an id may hold, become question marks, and
    keys in URIs are hidden."""
    return _CONTROL.sub("?", without_secrets(text))


def say(text: str, *, always: bool = False) -> None:
    """Print one line for people.

    Args:
        always: even with `--quiet`.
    """
    if always or not _quiet:
        with _line.lock:
            _line.clear()
            print(printable(text), file=people(), flush=True)


def duration(seconds: float) -> str:
    """`7.3 s`, `4 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def standing() -> tuple[str, float] | None:
    """The stage at work, and for how many seconds it has finished no unit of work; None while there is none."""
    shown = _open[-1:]  # other threads open and close
    return (shown[0].stage, time.monotonic() - _moved) if shown else None


def _move() -> None:
    global _moved
    _moved = time.monotonic()


class _LiveLine:
    """The last line of the terminal: the progress that began last, rewritten by a thread."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.shown: list[Progress] = []
        self._written = False

    def push(self, progress: Progress) -> None:
        with self.lock:
            self.shown.append(progress)
            if len(self.shown) == 1:
                threading.Thread(target=self._rewrite, args=(progress,), daemon=True).start()

    def remove(self, progress: Progress) -> None:
        with self.lock:
            self.shown.remove(progress)
            self.clear()

    def clear(self) -> None:
        """Leave an empty line for other output."""
        if self._written:
            print(erased(), end="", file=people(), flush=True)
            self._written = False

    def _rewrite(self, outermost: Progress) -> None:
        while True:
            with self.lock:
                if outermost not in self.shown:
                    return
                text = printable(self.shown[-1].line())[: columns() - 1]  # a line that wraps cannot be rewritten
                print(f"{erased()}{text}", end="", file=people(), flush=True)
                self._written = True
            time.sleep(_REWRITE_EVERY_S if people().isatty() else _NOTEBOOK_EVERY_S)


_line = _LiveLine()


class Progress:
    """Progress of one stage; a context manager.

    A terminal or a notebook shows one line with the time so far and the time left. Elsewhere (in a log) a line is
    printed every ten seconds.

    Args:
        stage: the name in front of the line.
        total: how many units there are; None when that is not known before the end.
        unit: what is counted: `passages`, `queries`, `steps`.
        done: units that an earlier run has finished; they do not count into the rate.
    """

    def __init__(self, stage: str, total: int | None = None, unit: str = "", done: int = 0) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.started = time.monotonic()
        self.note = ""
        self.count_from(done)
        self._printed = self.started
        self._live = False

    def __enter__(self) -> Progress:
        _open.append(self)
        _move()
        self._live = may_rewrite() and not _quiet
        if self._live:
            _line.push(self)
        elif not self.unit:
            say(f"{self.stage}: starting")
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        _move()
        if self._live:
            _line.remove(self)

    def count_from(self, done: int) -> None:
        """Count the rate from now on; `done` units are finished."""
        self.done = self._at_start = done
        self._counts_since = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the stage began, in this process."""
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Units a second, of this process alone."""
        return (self.done - self._at_start) / max(time.monotonic() - self._counts_since, 1e-9)

    def advance(self, count: int) -> None:
        """`count` more units are done."""
        self.reach(self.done + count)

    def reach(self, done: int, total: int | None = None) -> None:
        """`done` units are finished in all."""
        if done != self.done:
            _move()
        self.done = done
        self.total = total if total is not None else self.total
        now = time.monotonic()
        if not self._live and now - self._printed >= _PRINT_EVERY_S:
            self._printed = now
            say(self.line())

    def line(self) -> str:
        """`embed: 16 of 60 passages (27 %), 12.0 s, 33.0 s left, 1.3 passages/s`; a log has no time so far."""
        parts = [duration(_line.shown[0].seconds)] if self._live else []  # of the stage, which began first
        if not self.unit:
            return ", ".join([f"{self.stage}: working", *parts])
        count = f"{self.done:,} {self.unit}"
        if self.total:
            count = f"{self.done:,} of {self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %)"
            if self.rate > 0 and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / self.rate)} left")
        if self.rate > 0:
            parts.append(f"{self.rate:,.1f} {self.unit}/s")
        return ", ".join([f"{self.stage}: {count}", *parts, *([self.note] if self.note else [])])
