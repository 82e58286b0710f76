"""Loggers of other packages, as callbacks of Ray Train.

A package registers a subclass of `ray.train.UserCallback` as an entry point of the group `ckd_ray.callbacks`, and a
configuration names it (`distill.callbacks: [NAME]`). A configuration can only name what is installed under that group,
so an untrusted one cannot choose which code runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from ckd_ray.errors import UserError

GROUP = "ckd_ray.callbacks"


def load_callbacks(names: Sequence[str], key: str) -> list[Any]:
    """An instance of each named callback, constructed without arguments.

    Raises:
        UserError: no installed package registers the name, or it is not a UserCallback.
    """
    from ray.train import UserCallback

    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    found = []
    for name in names:
        if name not in known:
            raise UserError(
                f"no installed package registers a callback {name!r}",
                where=f"{key}.callbacks",
                expected=", ".join(sorted(known)) or f"a package with an entry point in the group {GROUP}",
                found=name,
            )
        kind = known[name].load()
        if not (isinstance(kind, type) and issubclass(kind, UserCallback)):
            raise UserError(
                f"{known[name].value} is no subclass of ray.train.UserCallback", where=f"{key}.callbacks", found=name
            )
        found.append(kind())
    return found
