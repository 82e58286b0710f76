"""Asking before something is started or ended."""

from __future__ import annotations

import sys

from ckd_ray.errors import UserError


def confirmed(question: str, yes: bool) -> bool:
    """The answer of whoever sits at the terminal; True at once with `yes`.

    Raises:
        UserError: nobody can be asked.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("nobody is there to be asked", where=question, fix="-y says yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
