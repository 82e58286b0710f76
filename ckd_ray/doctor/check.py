"""One finding of `ckd-ray doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "warn", "fail"]
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """The name of a check, its result, what was found, and what to do about it unless the result is `ok`."""

    name: str
    state: State
    found: str
    fix: str | None = None

    def __post_init__(self) -> None:
        assert self.state == "ok" or self.fix, f"{self.name}: a finding without advice"
        if self.state == "ok":
            object.__setattr__(self, "fix", None)


def render(checks: Iterable[Check]) -> str:
    """A line for each check, and below it what to do if it is not ok."""
    rows = list(checks)
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.state:<4}  {row.name:<{width}}  {row.found}")
        if row.state != "ok":
            lines.append(f"      {'':<{width}}  -> {row.fix}")
    return "\n".join(lines)


def as_json(checks: Iterable[Check]) -> dict[str, Any]:
    """The object of `--json`: `ok` (no check failed) and the checks."""
    rows = list(checks)
    return {"ok": all(row.state != "fail" for row in rows), "checks": [asdict(row) for row in rows]}
