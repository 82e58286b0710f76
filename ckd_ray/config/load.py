"""YAML and `--set` into a checked `Config`. All problems are collected and raised at once."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ckd_ray.config.checks import impossible_combinations
from ckd_ray.config.schema import Config
from ckd_ray.errors import UserError

QUICKSTART = "quickstart.yaml"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the dotted path of the key, and a sentence."""

    path: str
    message: str


class ConfigError(UserError):
    """Everything that is wrong with a configuration, in `problems`."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count} in the configuration ({source})", *map(_line, problems)]))


def _line(problem: Problem) -> str:
    return f"  {problem.path}: {problem.message}" if problem.path else f"  {problem.message}"


def load_config(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a YAML file; None reads the quick start that comes with the package.
        overrides: `key.path=value`, the value in YAML; later ones win.

    Raises:
        ConfigError: with every problem of the file, the overrides and their combination.
    """
    source = path or f"embedded {QUICKSTART}"
    problems: list[Problem] = []
    tree = _read(path, source, problems)
    for override in overrides:
        _apply(tree, override, problems)
    config = _validate(tree, problems)
    if config is not None:
        known = {problem.path for problem in problems}
        problems += [Problem(*found) for found in impossible_combinations(config) if found[0] not in known]
    if problems or config is None:
        raise ConfigError(source, problems)
    return config


def quickstart_text() -> str:
    """The YAML of the embedded default, `configs/quickstart.yaml`, which is installed with the package."""
    return resources.files("ckd_ray.config").joinpath(QUICKSTART).read_text(encoding="utf-8")


def _validate(tree: dict[str, Any], problems: list[Problem]) -> Config | None:
    """The configuration; wrong keys are noted and fall back to their defaults, so that combinations are checked as
    well."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        found = error.errors()
    sound = copy.deepcopy(tree)
    for item in found:
        problem = _problem(item)
        if problem not in problems:
            problems.append(problem)
        inner: Any = sound
        for name in item["loc"][:1] if len(item["loc"]) == 1 else item["loc"][:2]:
            if isinstance(inner, dict) and isinstance(inner.get(name), dict) and name != item["loc"][-1]:
                inner = inner[name]
            elif isinstance(inner, dict):
                inner.pop(name, None)
    try:
        return Config.model_validate(sound)
    except ValidationError:
        return None


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 3e-6 as a number (YAML 1.1 does not) and refuses a key given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = [key for i, key in enumerate(keys) if key in keys[:i]]
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
    return dict(zip(keys, [loader.construct_object(value, deep=True) for _, value in node.value], strict=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader


def _read(path: str | None, source: str, problems: list[Problem]) -> dict[str, Any]:
    try:
        text = quickstart_text() if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise UserError("the configuration cannot be read", where=source, found=reason) from None
    try:
        tree = _parse(text)
    except (yaml.YAMLError, TypeError) as error:
        raise UserError("not valid YAML", where=source, found=" ".join(str(error).split())) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        problems.append(Problem("", f"expected sections ({', '.join(Config.model_fields)}), found {_kind(tree)}"))
        return {}
    return tree


def _apply(tree: dict[str, Any], override: str, problems: list[Problem]) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        problems.append(Problem("", f"--set {override!r}: expected key=value, such as distill.temperature=0.3"))
        return
    try:
        value = _parse(text)
    except (yaml.YAMLError, TypeError) as error:
        problems.append(Problem(key, f"--set {override!r}: not valid YAML ({' '.join(str(error).split())})"))
        return
    for name in names[:-1]:
        inner = tree.get(name)
        if inner is None:
            inner = tree[name] = {}
        if not isinstance(inner, dict):
            problems.append(Problem(key, f"--set: {name} is {_kind(inner)}, not a section"))
            return
        tree = inner
    tree[names[-1]] = value


def _problem(error: Any) -> Problem:
    """A pydantic error in our words, with the nearest valid key for an unknown one.

    A key that takes `auto` or a number fails once for each kind; both become the one sentence that names both.
    """
    location = [
        part for part in error["loc"] if not (isinstance(part, str) and part.startswith(("literal[", "constrained-")))
    ]
    location = [part for part in location if part not in ("int", "float", "str")]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    if error["type"] == "extra_forbidden":
        return Problem(path, f"unknown key{_nearest(path)}")
    if error["type"] == "model_type":
        return Problem(path, f"expected a section of keys, found {_kind(error['input'])}")
    if any(option == "auto" for option in _options(path)):
        return Problem(path, f"expected auto or a number in range, found {_kind(error['input'])}")
    return Problem(path, f"{error['msg'][:1].lower()}{error['msg'][1:]}, found {_kind(error['input'])}")


def _options(path: str) -> tuple[Any, ...]:
    """The literal alternatives of a key's type, when its type is a union."""
    section, _, name = path.partition(".")
    kind = Config.model_fields[section].annotation if section in Config.model_fields else None
    fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
    parts = get_args(fields[name].annotation) if name in fields else ()
    return tuple(value for part in parts for value in get_args(part))


def _nearest(path: str) -> str:
    valid = list(_paths(Config))
    section, _, name = path.rpartition(".")
    siblings = [p for p in valid if p.rpartition(".")[0] == section]
    close = difflib.get_close_matches(path, siblings, 1, 0.6) or difflib.get_close_matches(path, valid, 1, 0.6)
    if not close:  # the right name in the wrong section
        close = [p for p in valid if p.rpartition(".")[2] == name][:1]
    return f"; did you mean {close[0]}?" if close else ""


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _paths(kind, f"{prefix}{name}.")


def _kind(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
