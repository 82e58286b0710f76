"""Problems of input files, collected so that a user can correct them all at once."""

from __future__ import annotations

from ckd_ray.errors import UserError

_MOST = 20


class InputError(UserError):
    """Everything wrong that was found in the input, one line a problem."""

    def __init__(self, problems: list[str], more: bool, of: str = "the collection") -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        head = f"{'the first ' if more else ''}{count} in {of}"
        super().__init__("\n".join([head, *(f"  {p}" for p in problems)]))


class Problems:
    """A list that raises when it holds `most` problems (None: never). `of` says what was read."""

    def __init__(self, most: int | None = _MOST, of: str = "the collection") -> None:
        self.lines: list[str] = []
        self._most, self._of = most, of

    def add(self, where: str, what: str, *, expected: str, found: str, fix: str | None = None) -> None:
        """Note a problem; the twentieth stops the reading."""
        text = f"{where}: {what}; expected {expected}, found {found}"
        self.lines.append(text + (f"; fix: {fix}" if fix else ""))
        if self._most is not None and len(self.lines) >= self._most:
            raise InputError(self.lines, more=True, of=self._of)

    def check(self) -> None:
        """Raise when there are any."""
        if self.lines:
            raise InputError(self.lines, more=False, of=self._of)


def shorten(value: str) -> str:
    """A value fit for a message: one line, printable, not long."""
    return repr(value if len(value) <= 60 else value[:57] + "...")
