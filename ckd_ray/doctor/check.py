"""One finding of `ckd-ray doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "warn", "fail"]
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """What was looked at (`name`), how it stands, what was found, and what to do about it (nothing when ok)."""

    name: str
    state: State
    found: str
    fix: str | None = None

    def __post_init__(self) -> None:
        assert (self.state == "ok") or self.fix, f"{self.name}: a finding without advice"


def render(checks: Iterable[Check]) -> str:
    """One line a check, and below what is not ok what to do."""
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
