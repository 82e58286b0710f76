"""How to continue an interrupted command: with the same command, without the options that begin anew."""

from __future__ import annotations

_left_out: list[str] = []


def remember(*, fresh: bool, start: str | None) -> None:
    """Keep whether the command of this process has `--fresh` and `--from`."""
    _left_out[:] = [option for option, given in (("--fresh", fresh), ("--from", start is not None)) if given]


def same_command() -> str:
    """`the same command`, or `the same command without --fresh`."""
    return " ".join(["the same command", *(["without", " and ".join(_left_out)] if _left_out else [])])
