"""The errors with which a command fails, because of the user's input (exit status 2) or of the job (exit status 1), and
the one-line message of another library's error."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

# Ray Data adds to an error of a task or of storage how often it has tried, and how to let it try more often.
_ADVICE_OF_RAY_DATA = re.compile(r"(^|\n)Failed to [^\n]+ after \d+/\d+ attempts.*", re.DOTALL)


class UserError(ValueError):
    """Input or configuration that the user can correct; shown without a traceback, exit status 2.

    Args:
        problem: one sentence, what is wrong.
        where: the file and line, the configuration key, or the option.
        expected: what is accepted.
        found: what is there instead, as one line.
        fix: what to do next.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.where, self.expected, self.found, self.fix = problem, where, expected, found, fix
        lines = [f"{where}: {problem}" if where else problem]
        for name, value in (("expected", expected), ("found", found), ("fix", fix)):
            if value is not None:
                lines.append(f"  {name}: {value}")
        super().__init__("\n".join(lines))


class JobError(RuntimeError):
    """The job itself failed (a lost cluster, a full disk, a diverged loss); exit status 1."""


class LostRayError(JobError):
    """The Ray of this process is lost, or does not get on, and nothing that needs it can be tried again."""


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's message, cut to `most` characters; the name of its type when it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def first_mistake(error: ValidationError) -> str:
    """The first value that pydantic refuses, and what it expects: `lanes.cores is -1, expected ...`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"no {where}"
    return f"{where} is {first['input']!r:.60}, {first['msg'].replace('Input should be', 'expected')}"


def last_line(error: BaseException) -> str:
    """The last line of an error's message, which is what was raised when a traceback stands before it.

    Errors of CUDA and of a machine without memory have advice after the line that names them. So that line is taken if
    there is one.
    """
    message = without_advice(str(error))
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "CUDA error" in line or "Memory on the node" in line), lines[-1])


def without_advice(message: str) -> str:
    """The message of an error without what Ray Data has added to it."""
    return _ADVICE_OF_RAY_DATA.sub("", message)


def described(error: BaseException) -> str:
    """Type and message; for an error of a Ray task, those of the error that was raised there; of an actor, both."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException) and cause is not error:
        wrapper = "" if type(error).__name__.startswith("RayTaskError") else f"{type(error).__name__}: "
        return wrapper + described(cause)
    return f"{type(error).__name__}: {last_line(error)}"
