"""Where output goes: lines for people, the one object of `--json`, and a log file for what libraries print.

Ray, its daemons and the libraries print from Python, from C++ and from child processes. So the descriptors 1 and 2 are
redirected, and our own output goes to copies of the descriptors with which the process was started.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

from ckd_ray.errors import UserError

_people: TextIO | None = None
_objects: TextIO | None = None
_verbose = False
_log: Path | None = None
_keep_log = False


def people() -> TextIO:
    """The stream for people: standard error as this process was given it. A notebook shows that in red, so there it is
    standard output."""
    return _people or (sys.stdout if in_notebook() else sys.stderr)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def objects() -> TextIO:
    """The stream for programs: standard output as this process was given it."""
    return _objects or sys.stdout


def is_redirected() -> bool:
    """Whether `only_ours` is in force, so that others cannot print to `objects()`."""
    return _people is not None


def may_rewrite() -> bool:
    """Whether a line for people may be rewritten in place: they sit at a terminal or a notebook, and nothing else
    prints there."""
    return (_people is None and in_notebook()) or (people().isatty() and not _verbose)


def columns() -> int:
    """The width of a line for people; a notebook has none, and gets the usual one."""
    try:
        return os.get_terminal_size(people().fileno()).columns or 80
    except OSError:  # io.UnsupportedOperation
        return 80


def erased() -> str:
    """The characters that empty the last line for people. A notebook ignores terminal codes."""
    return "\r\x1b[K" if people().isatty() else f"\r{' ' * (columns() - 1)}\r"


def may_colour(stream: TextIO) -> bool:
    """Colours are for terminals, and for people who have not set NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def log_path() -> Path | None:
    """The log of this command, if there is one."""
    return _log


def keep_log() -> Path | None:
    """The log of this command, which is then kept even if the command succeeds."""
    global _keep_log
    _keep_log = True
    return _log


@contextmanager
def only_ours(*, verbose: bool = False) -> Iterator[None]:
    """Show nothing but our own lines for the length of the block; what others print goes to a new log file.

    The log is deleted at the end, unless the block fails for a reason that is not the user's. A nested call changes
    nothing.

    Args:
        verbose: what others print goes to standard error, not to a log.
    """
    global _people, _objects, _verbose, _log, _keep_log
    if _people is not None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    _people, _objects, _verbose, _log, _keep_log = _copy(sys.stderr), _copy(sys.stdout), verbose, None, False
    if verbose:
        target = os.dup(2)
    else:
        target, name = tempfile.mkstemp(prefix="ckd-ray-", suffix=".log")
        _log = Path(name)
    try:
        with _redirected(target):
            yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException:
        _keep_log = True
        raise
    finally:
        _people = _objects = None
        _verbose = False
        if _log is not None and not (_keep_log and _log.stat().st_size):
            _log.unlink()
            _log = None


@contextmanager
def _redirected(target: int) -> Iterator[None]:
    """Both standard outputs go to the descriptor `target`, which is closed at the end."""
    before = os.dup(1), os.dup(2)
    # Never closed: handlers of Python's logging keep it until the process ends.
    text = _Log(open(os.dup(target), "wb"), encoding="utf-8", errors="replace", line_buffering=True)  # noqa: SIM115
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)
        with redirect_stdout(text), redirect_stderr(text):
            yield
    finally:
        text.flush()
        for number, descriptor in enumerate(before, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)


class _Log(io.TextIOWrapper):
    """A line that does not fit on the log's disk is dropped. It stops neither the code that prints it nor the end of
    the command, which still prints its own message."""

    def write(self, text: str) -> int:
        """Returns the length of the text, even if it was dropped."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """As far as the disk allows."""
        with suppress(OSError):
            super().flush()


def _copy(stream: TextIO) -> TextIO:
    """The same place through a descriptor of its own; the stream itself where it has none (in tests)."""
    try:
        return open(os.dup(stream.fileno()), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)
    except OSError:  # io.UnsupportedOperation
        return stream
