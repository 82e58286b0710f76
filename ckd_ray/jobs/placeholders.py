"""Values that our example files leave for the user to fill in. They are refused before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckd_ray.config import Config
from ckd_ray.errors import UserError
from ckd_ray.jobs.aws import not_filled_in

PLACEHOLDER = "CHANGE-ME"


def check_launcher_filled_in(prepared: dict[str, Any], where: str) -> None:
    """Refuse a launcher's file, at the path `where`, that has values to be filled in.

    Raises:
        UserError: names every such key, and how to find its value.
    """
    found = [(key, f"a value of yours for {key}") for key, text in texts(prepared) if PLACEHOLDER in text]
    if prepared["provider"]["type"] == "aws":
        found += not_filled_in(prepared)
    if found:
        raise UserError(
            "values of this file are still to be filled in",
            where=where,
            found="; ".join(key for key, _ in found),
            fix="; ".join(dict.fromkeys(fix for _, fix in found)),
        )


def check_config_filled_in(config: Config) -> None:
    """Refuse a configuration that holds CHANGE-ME. UserError names every such key."""
    found = [(key, text) for key, text in texts(config.model_dump(mode="json")) if PLACEHOLDER in text]
    if found:
        raise UserError(
            f"still to be filled in ({PLACEHOLDER})",
            where=", ".join(key for key, _ in found),
            found=", ".join(text for _, text in found),
            fix=f"change the file, or --set {found[0][0]}=VALUE",
        )


def texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every text in nested dictionaries and lists: `run.storage`, `evaluate.measures[0]`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from texts(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from texts(inner, f"{path}[{i}]")
    elif isinstance(value, str):
        yield path, value
