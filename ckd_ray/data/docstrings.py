"""A real collection on every machine: the documentation of installed Python packages.

A query is the first sentence of a docstring; its labelled passage is the qualified name and the rest of the docstring,
without that sentence. Sources are parsed, never imported. The first of several docstrings with the same words counts,
and the first of several definitions of a name (the getter and the setter of a property, overloads).
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ckd_ray.config import CollectionConfig
from ckd_ray.data.problems import Problems
from ckd_ray.data.readers import QrelRow, TextRow
from ckd_ray.data.sources import Source
from ckd_ray.errors import UserError

# Dependencies of ckd-ray, so they are always installed, with docstrings of prose. (transformers would double the corpus
# and take 20 seconds to parse, and most of it repeats one pattern a model.)
PACKAGES = ("torch", "numpy", "pandas", "pyarrow", "ray", "pydantic")
_FEWEST_QUERY_WORDS, _FEWEST_PASSAGE_WORDS, _MOST_PASSAGE_CHARACTERS = 5, 12, 4000
# Two fifths for the test: a difference of 0.05 in MRR@10 needs some 600 queries to stand out from chance, and the quick
# start trains on 700 of them.
_HELD_OUT_OF_100 = {"test": 40, "dev": 10}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`:\[(*\"'])")


@dataclass(frozen=True)
class Entry:
    """A docstring: the qualified name, the first sentence, the rest."""

    name: str
    sentence: str
    rest: str

    @property
    def split(self) -> str:
        """Depends on a hash of the name alone, so other packages do not change it."""
        bucket = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big") % 100
        edge = 0
        for split, share in _HELD_OUT_OF_100.items():
            edge += share
            if bucket < edge:
                return split
        return "train"


def docstring_source(settings: CollectionConfig) -> Source:
    """Reads collection.packages, or the packages that ckd-ray depends on.

    Raises:
        UserError: a package named in the configuration is not installed, or there is no documentation at all.
    """
    named = settings.packages is not None
    entries: dict[str, Entry] = {}
    seen: set[str] = set()
    for package in settings.packages or PACKAGES:
        files = _sources(package)
        if files is None and named:
            problem, fix = f"the package {package!r} is not installed", f"pip install {package}"
            raise UserError(problem, where="collection.packages", fix=fix)
        for module, path in files or ():
            for entry in read_docstrings(module, path):
                key = " ".join((entry.sentence + entry.rest).lower().split())
                if key not in seen and entry.name not in entries:
                    seen.add(key)
                    entries[entry.name] = entry
    if not entries:
        raise UserError("the installed packages hold no documentation", where="collection.packages")
    # A hash orders them, so that a limit keeps a mixture of all packages.
    ordered = sorted(entries.values(), key=lambda e: hashlib.sha256(e.name.encode()).digest())[: settings.limit]

    def texts(split: str | None, query: bool) -> Iterator[TextRow]:
        for entry in ordered:
            if split in (None, entry.split):
                yield TextRow(entry.name, entry.sentence if query else f"{entry.name}\n{entry.rest}", entry.name)

    def qrels(split: str, problems: Problems) -> Iterator[QrelRow]:
        return (QrelRow(e.name, e.name, 1, e.name) for e in ordered if e.split == split)

    return Source(
        passages=lambda problems: texts(None, query=False),
        queries=lambda split, problems: texts(split, query=True),
        qrels=qrels,
        splits=("train", "dev", "test"),
        files=(),
    )


def versions(settings: CollectionConfig) -> dict[str, str]:
    """The installed version of each package that is read; documentation changes with it."""
    found = {}
    for package in settings.packages or PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _sources(package: str) -> list[tuple[str, Path]] | None:
    """(module name, file) of a distribution's Python sources, sorted; None when it is not installed."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        return None
    found = []
    for file in files:
        parts = file.parts
        private = any(p in ("tests", "test", "testing") or p.startswith("_") for p in parts[:-1])
        names = [*parts[:-1], *([] if file.stem == "__init__" else [file.stem])]
        if names and file.suffix == ".py" and not private and not parts[0].startswith("."):
            found.append((".".join(names), Path(str(file.locate()))))
    return sorted(found)


def read_docstrings(module: str, path: Path) -> Iterator[Entry]:
    """Documented classes and functions of one source file, outer ones first; none when the file does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    waiting: deque[tuple[str, ast.AST]] = deque([(module, tree)])
    while waiting:
        prefix, node = waiting.popleft()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if child.name.startswith("_"):
                    continue
                name = f"{prefix}.{child.name}"
                entry = split_docstring(name, ast.get_docstring(child) or "")
                if entry is not None:
                    yield entry
                waiting.append((name, child))


def split_docstring(name: str, docstring: str) -> Entry | None:
    """The first sentence and the rest; None when either is too short for a query or a passage."""
    paragraph, _, below = docstring.strip().partition("\n\n")
    sentences = _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)
    sentence, inline = sentences[0], " ".join(sentences[1:])
    rest = "\n".join(part for part in (inline, " ".join(below.split())) if part)[:_MOST_PASSAGE_CHARACTERS]
    rest = rest.replace(sentence, " ") if sentence else rest
    if len(sentence.split()) < _FEWEST_QUERY_WORDS or len(rest.split()) < _FEWEST_PASSAGE_WORDS:
        return None
    return Entry(name, sentence, rest.strip())
