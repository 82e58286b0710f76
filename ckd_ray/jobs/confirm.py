"""The question before something starts or ends."""

from __future__ import annotations

import sys

from ckd_ray.errors import UserError
from ckd_ray.streams import people


def confirmed(question: str, yes: bool) -> bool:
    """Ask the person at the terminal; with `yes` the answer is True without a question.

    Raises:
        UserError: standard input is no terminal.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("standard input is no terminal, so nobody can answer", where=question, fix="-y answers yes")
    print(f"{question} [y/N] ", end="", file=people(), flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
