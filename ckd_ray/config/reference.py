"""The page about the configuration, made of the schema: `python -m ckd_ray.config.reference > PAGE`."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ckd_ray.config.schema import OPERATIONAL, Config, Section

_HEAD = """# Configuration

Every key, with its type, its default and its meaning. `python -m ckd_ray.config.reference` writes this page from
`ckd_ray/config/schema.py`; a test compares the two.

A configuration is a YAML file of sections (`--config FILE`). `--set SECTION.KEY=VALUE` sets one key and may be
repeated. Every key has a default, so a file holds only what differs. All mistakes are reported at once, each with its
path and the nearest valid key. `configs/` has examples.

Default steps and learning rates are for a small pretrained encoder with a new projection. The paper's, for BERT-base
and long training, are in `configs/published.yaml` with the rest of its recipe.

*Operational* keys say where, how fast or how safely work is done. A change of such a key repeats nothing. A change of
any other key repeats the stages that read it and all stages that follow from them.
"""
_KEYS = "\nAttributes:\n"
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false"}
_BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}


def page() -> str:
    """The page in Markdown: a table a section, a row a key."""
    parts = [_HEAD]
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        about = inspect.cleandoc(section.__doc__ or "").partition(_KEYS)[0].strip()
        rows = "".join(f"{row}\n" for row in _rows(name, section))
        parts.append(f"## {name}\n\n{about}\n\n| key | type | default | meaning |\n|---|---|---|---|\n{rows}")
    return "\n".join(parts)


def _rows(section: str, model: type[Section]) -> Iterator[str]:
    meanings = meanings_of(model)
    for name, field in model.model_fields.items():
        operational = " *Operational.*" if OPERATIONAL in field.metadata else ""
        meaning = meanings.get(name, "") + operational
        cells = (f"`{section}.{name}`", _kind(field.annotation, field.metadata), f"`{_default(field)}`", meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def meanings_of(model: type[Section]) -> dict[str, str]:
    """Each key with its text under `Attributes`, in the docstring of the section or of one that it inherits from."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if issubclass(kind, Section):
            listed = inspect.cleandoc(kind.__doc__ or "").partition(_KEYS)[2]
            for name, text in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", listed, re.MULTILINE):
                found[name] = " ".join(text.split())
    return found


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return value if isinstance(value, str) else json.dumps(value)


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values that a type takes, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for given in arguments[1:] for m in (given.metadata if isinstance(given, FieldInfo) else [given])]
        return _kind(arguments[0], inner)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(argument) for argument in arguments)
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"mapping of {_kind(arguments[0])} to {_kind(arguments[1])}"
    if annotation is type(None):
        return "`null`"
    return _NAMES.get(annotation, "value") + _range(metadata)


def _range(metadata: Sequence[Any]) -> str:
    bounds = ((word, getattr(m, sign, None)) for m in metadata for sign, word in _BOUNDS.items())
    told = [f"{word} {bound:,}" for word, bound in bounds if bound is not None and bound < 2**31]
    return f" {' '.join(told)}" if told else ""


if __name__ == "__main__":
    print(page(), end="")
