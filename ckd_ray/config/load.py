"""Read YAML and `--set` into a checked `Config`. All problems are collected and raised together."""

from __future__ import annotations

import copy
import difflib
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from ckd_ray.config.schema import Config
from ckd_ray.errors import UserError

QUICKSTART = "quickstart.yaml"


@dataclass(frozen=True)
class Problem:
    """A problem: the dotted path of the key, and a sentence."""

    path: str
    message: str


class ConfigError(UserError):
    """All `problems` of a configuration."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"  {p.path}: {p.message}" if p.path else f"  {p.message}" for p in problems]
        super().__init__("\n".join([f"{count} in the configuration ({source})", *lines]))


Check = Callable[[Config], Iterator[tuple[str, str]]]


def read_config(path: str | None, overrides: Sequence[str], check: Check) -> Config:
    """Read a configuration and check it; `ckd_ray.checks.load_config` does so with every check.

    Args:
        path: a YAML file; None reads the quick start of the package. When an override then names another collection,
            the defaults of the schema replace the quick start, whose sizes and steps are for its own small corpus.
        overrides: `key.path=value`, the value in YAML; later ones win. A mapping is merged into the section it names.
        check: yields (path of a key, problem) for combinations of keys that cannot work.

    Raises:
        ConfigError: with every problem of the file, the overrides and their combination.
    """
    source = path or f"embedded {QUICKSTART}"
    problems: list[Problem] = []
    tree = _read(path, source, problems)
    named = {override.partition("=")[0].strip() for override in overrides}
    if path is None and named & {"collection", "collection.format", "collection.path"}:
        tree = {"run": tree["run"]}
    for override in overrides:
        _apply(tree, override, problems)
    config = _validate(tree, problems)
    if config is not None:
        known = {problem.path for problem in problems}
        problems += [Problem(*found) for found in check(config) if found[0] not in known]
    if problems or config is None:
        raise ConfigError(source, problems)
    return config


def quickstart_text() -> str:
    """The YAML of the embedded quick start, `configs/quickstart.yaml`, which is installed with the package."""
    return resources.files("ckd_ray.config").joinpath(QUICKSTART).read_text(encoding="utf-8")


def _validate(tree: dict[str, Any], problems: list[Problem]) -> Config | None:
    """The configuration. Wrong keys are added to `problems` and get their defaults, so that the combinations of the
    other keys can be checked too."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        found = error.errors()
    sound = copy.deepcopy(tree)
    for item in found:
        problems += [problem for problem in _problems(item) if problem not in problems]
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
    """Safe YAML that reads 3e-6 as a number; YAML 1.1 does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_UNREADABLE = (yaml.YAMLError, TypeError, ValueError, RecursionError)  # PyYAML raises these for bad YAML


def _parse(text: str) -> tuple[Any, list[Problem]]:
    """The value of a YAML text, and problems for repeated keys, of which PyYAML would silently keep the last."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        twice = list(_given_twice(node, "", set()))
        return loader.construct_document(node), twice
    finally:
        loader.dispose()


def _given_twice(node: yaml.Node, path: str, met: set[int]) -> Iterator[Problem]:
    """Visits each node once, because an anchor may be used many times."""
    if id(node) in met or not isinstance(node, yaml.CollectionNode):
        return
    met.add(id(node))
    lines: dict[str, int] = {}
    for entry in node.value:
        key, value = entry if isinstance(node, yaml.MappingNode) else (None, entry)
        inner = path
        if isinstance(key, yaml.ScalarNode):
            inner = f"{path}.{key.value}".lstrip(".")
            line = key.start_mark.line + 1
            if key.value in lines:
                yield Problem(inner, f"is given twice, in lines {lines[key.value]} and {line}")
            lines.setdefault(key.value, line)
        yield from _given_twice(value, inner, met)


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    parts = [getattr(error, name, None) for name in ("context", "problem")]
    return " ".join((", ".join(filter(None, parts)) or str(error)).split())[:300]


def _read(path: str | None, source: str, problems: list[Problem]) -> dict[str, Any]:
    try:
        text = quickstart_text() if path is None else Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        fix = "`ckd-ray init DIR` writes one for a folder of files; without --config the quick start runs"
        raise UserError("the configuration cannot be read", where=source, found=reason, fix=fix) from None
    try:
        tree, twice = _parse(text)
    except _UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        place = source if mark is None else f"{source}:{mark.line + 1}"
        fix = (
            "sections are indented by spaces, not by tabs, and a colon is followed by a space; brackets end in the line"
        )
        raise UserError("not valid YAML", where=place, found=_reason(error), fix=fix) from None
    problems += twice
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        problems.append(Problem("", f"expected sections ({', '.join(Config.model_fields)}), found {_kind(tree)}"))
        return {}
    # A section is null when all its keys are commented out.
    return {key: value for key, value in tree.items() if value is not None or key not in Config.model_fields}


def _apply(tree: dict[str, Any], override: str, problems: list[Problem]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    names = key.split(".")
    shown = f"--set {_kind(override)}"
    if not equals or not all(names):
        problems.append(Problem("", f"{shown}: expected key=value, such as distill.temperature=0.3"))
        return
    try:
        value, twice = _parse(text)
    except _UNREADABLE as error:
        problems.append(Problem(key, f"{shown}: not valid YAML ({_reason(error)})"))
        return
    problems += [Problem(f"{key}.{problem.path}", problem.message) for problem in twice]
    for name in names[:-1]:
        inner = tree.get(name)
        if not isinstance(inner, dict | None):
            problems.append(Problem(key, f"--set: {name} is {_kind(inner)}, not a section"))
            return
        tree[name] = dict(inner or {})  # a copy, because an anchor can make two sections the same object
        tree = tree[name]
    before = tree.get(names[-1])
    tree[names[-1]] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value


def _problems(error: Any) -> Iterator[Problem]:
    """A pydantic error as our problems; an unknown section is one for each key, with the nearest valid key."""
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1 and isinstance(error["input"], dict):
        for name in error["input"]:
            path = f"{error['loc'][0]}.{name}"
            yield Problem(path, f"unknown key{_nearest(path)}")
        if error["input"]:
            return
    yield _problem(error)


def _problem(error: Any) -> Problem:
    """A pydantic error as a problem, with the nearest valid key for an unknown one.

    A key that takes `auto` or a number fails once for each kind; both failures become one sentence.
    """
    location = [
        part for part in error["loc"] if not (isinstance(part, str) and part.startswith(("literal[", "constrained-")))
    ]
    location = [part for part in location if part not in ("int", "float", "str", "bool", "list", "[key]")]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    found = _kind(error["input"])
    if error["type"] == "extra_forbidden":
        return Problem(path, f"unknown key{_nearest(path)}")
    if error["type"] == "model_type":
        return Problem(path, f"expected a section of keys, found {found}")
    if any(option == "auto" for option in _options(path)) and error["type"] != "switch":
        others = "true or false" if bool in get_args(_annotation(path)) else f"a number in range{_range(path)}"
        return Problem(path, f"expected auto or {others}, found {found}")
    if error["type"] == "string_type" and not isinstance(error["input"], dict | list | None):
        return Problem(path, f"expected a string, found {found}; put it in quotes if it is meant as one")
    wanted = error["msg"].partition(", unable to parse")[0].replace("Input should be", "expected")
    wanted = wanted.replace("a valid integer", "an integer").replace("valid ", "")
    return Problem(path, f"{wanted[:1].lower()}{wanted[1:]}, found {found}")


def _range(path: str) -> str:
    """The bounds of a key that takes `auto` or a number, in brackets; empty without bounds."""
    signs = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
    schema = TypeAdapter(_annotation(path)).core_schema
    bounds = next((c for c in schema.get("choices", []) if isinstance(c, dict) and signs.keys() & c.keys()), {})
    words = [f"{signs[key]} {bounds[key]:g}" for key in signs if key in bounds and bounds[key] < 2**31]
    return f" ({' '.join(words)})" if words else ""


def _annotation(path: str) -> Any:
    """The type of a key; None for a path that is not a key of a section."""
    section, _, name = path.partition(".")
    kind = Config.model_fields[section].annotation if section in Config.model_fields else None
    fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
    return fields[name].annotation if name in fields else None


def _options(path: str) -> tuple[Any, ...]:
    """The literal alternatives of a key's type, when its type is a union."""
    return tuple(value for part in get_args(_annotation(path)) for value in get_args(part))


def _nearest(path: str) -> str:
    """The valid key that was probably meant: a similar one of its section, its name elsewhere, or a similar path."""
    valid = list(_paths(Config))
    spelled = path.lower().replace("-", "_")
    section, _, name = spelled.rpartition(".")
    neighbours = {p.rpartition(".")[2]: p for p in valid if p.rpartition(".")[0] == section}
    elsewhere = [p for p in valid if p.rpartition(".")[2] == name]
    close = [
        *(neighbours[leaf] for leaf in difflib.get_close_matches(name, neighbours, 1, 0.75)),
        *difflib.get_close_matches(spelled, elsewhere, 1, 0.0),
        *difflib.get_close_matches(spelled, valid, 1, 0.6),
    ]
    return f"; did you mean {close[0]}?" if close else ""


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _paths(kind, f"{prefix}{name}.")


_SHORT = reprlib.Repr()  # bounded in depth and breadth: a few lines of YAML anchors can expand to gigabytes
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def _kind(value: Any) -> str:
    try:
        text = _SHORT.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
