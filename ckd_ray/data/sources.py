"""Sources: every format becomes the same three streams, passages, queries and qrels.

This module knows the files of each format, and readers.py reads one file. build.py checks what depends on the whole
collection (duplicates, unknown ids).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from ckd_ray.config import CollectionConfig
from ckd_ray.config.schema import Split
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.data.readers import LINES, QrelRow, TextRow, readers_of
from ckd_ray.data.tables import ENDINGS
from ckd_ray.errors import UserError
from ckd_ray.files import exists, is_folder, join, last_part, list_files, list_folders, parent

SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class Source:
    """The streams of a collection; each call reads from the start.

    Attributes:
        splits: those that have both queries and qrels.
        files: for the fingerprint of the input.
        shared_queries: splits share a file of queries; a split's queries are those that its qrels name.
    """

    passages: Callable[[Problems], Iterator[TextRow]]
    queries: Callable[[str, Problems], Iterator[TextRow]]
    qrels: Callable[[str, Problems], Iterator[QrelRow]]
    splits: tuple[str, ...]
    files: tuple[str, ...]
    shared_queries: bool = False


def open_source(settings: CollectionConfig) -> Source:
    """The source that the configuration names.

    Raises:
        UserError: a file or folder is missing.
    """
    if settings.format == "docstrings":
        from ckd_ray.data.docstrings import docstring_source

        return docstring_source(settings)
    if settings.format == "ir_datasets":
        from ckd_ray.data.irds import ir_datasets_source

        return ir_datasets_source(settings)
    return _file_source(settings)


# File names of passages, queries and qrels of each format, the usual one first; `*` is for parts, as hubs name them.
_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "msmarco": (("collection.tsv",), ("queries.{}.tsv",), ("qrels.{}.tsv",)),
    "beir": (
        ("corpus.jsonl", "corpus.parquet", "corpus"),
        ("queries.jsonl", "queries.parquet", "queries"),
        ("qrels/{}.tsv", "qrels/{}.jsonl", "qrels/{}.parquet", "qrels/{}-*.parquet"),
    ),
    "jsonl": (("passages.jsonl",), ("queries.{}.jsonl", "queries.jsonl"), ("qrels.{}.jsonl", "qrels.{}.tsv")),
    "parquet": (("passages.parquet",), ("queries.{}.parquet", "queries.parquet"), ("qrels.{}.parquet",)),
    "csv": (
        ("passages.csv", "passages.tsv"),
        ("queries.{}.csv", "queries.{}.tsv", "queries.csv", "queries.tsv"),
        ("qrels.{}.csv", "qrels.{}.tsv"),
    ),
}


def _file_source(settings: CollectionConfig) -> Source:
    kind = settings.format
    if settings.path is not None and not exists(settings.path):
        raise UserError("this folder does not exist", where="collection.path", found=settings.path)
    of_passages, of_queries, of_qrels = _NAMES[kind]
    passages = settings.passages or _find(settings, of_passages, required=True)
    assert passages is not None
    queries: dict[str, str] = {}
    qrels: dict[str, str] = {}
    for split in SPLITS:
        name, required = getattr(settings, split), split == "train"
        found_queries = settings.queries.get(split) or _find(settings, of_queries, required, name)
        found_qrels = settings.qrels.get(split) or _find(settings, of_qrels, required, name)
        if found_queries and found_qrels:
            queries[split], qrels[split] = found_queries, found_qrels
    endings = LINES if kind == "msmarco" else ENDINGS
    parts = {file: _parts(file, endings) for file in (passages, *queries.values(), *qrels.values())}
    read_passages, read_queries, read_qrels = readers_of(settings)
    return Source(
        passages=lambda problems: _one_by_one(read_passages, parts[passages], problems),
        queries=lambda split, problems: _one_by_one(read_queries, parts[queries[split]], problems),
        qrels=lambda split, problems: _one_by_one(read_qrels, parts[qrels[split]], problems),
        splits=tuple(queries),
        files=tuple(dict.fromkeys(file for some in parts.values() for file in some)),
        shared_queries=kind == "beir" or len(set(queries.values())) < len(queries),
    )


def _parts(uri: str, endings: tuple[str, ...]) -> tuple[str, ...]:
    """The file itself, or the files of a folder, as Spark and others write it, or of a pattern (`train-*.parquet`), in
    the order of their names.

    Names that begin with `_` or `.` are markers and checksums, and are left out.
    """
    if "*" in last_part(uri) and not exists(uri):
        return tuple(_matching(uri))
    if not is_folder(uri):
        if not exists(uri):
            raise UserError("this file does not exist", where="collection", found=uri)
        return (uri,)
    names = [name for name in list_files(uri) if not name.startswith(("_", "."))]
    others = [name for name in names if not name.endswith(endings)]
    # Partitions (`year=2024/`) are refused: the values in their names are no columns.
    others += [f"{name}/" for name in list_folders(uri) if not name.startswith(("_", "."))]
    if others or not names:
        raise UserError(
            "a folder in the place of a file holds what cannot be read" if others else "a folder without files",
            where=uri,
            expected=f"files whose names end with {', '.join(endings)}, and no folders",
            found=", ".join(shorten(name) for name in others[:8]) or "none",
            fix="move these out of the folder, or begin their names with _" if others else None,
        )
    return tuple(join(uri, name) for name in names)


def _one_by_one(read: Callable[[str, Problems], Iterator[Any]], files: tuple[str, ...], problems: Problems) -> Any:
    for file in files:
        yield from read(file, problems)


def _matching(pattern: str) -> list[str]:
    """The files whose names match a pattern, at least one."""
    folder, last = parent(pattern), last_part(pattern)
    names = list_files(folder)
    found = [join(folder, name) for name in names if fnmatch(name, last)]
    if not found:
        have = ", ".join(names[:12]) or "no files"
        raise UserError("no file has such a name", where=pattern, expected=last, found=have)
    return found


def _find(settings: CollectionConfig, names: tuple[str, ...], required: bool, split: str = "") -> str | None:
    """The first of `names` in the folder, or the same with .gz."""
    wanted = [name.format(split) for name in names]
    for name in wanted if settings.path else ():
        for candidate in (name, f"{name}.gz"):
            uri = join(str(settings.path), candidate)
            if exists(uri) or ("*" in name and any(fnmatch(f, last_part(uri)) for f in list_files(parent(uri)))):
                return uri
    if not required:
        return None
    names_there = list_files(settings.path) if settings.path else []
    have = "nothing: collection.path is not set"
    if settings.path:
        folders = [f"{name}/" for name in list_folders(settings.path)]
        have = ", ".join([*names_there, *folders][:12]) or "an empty folder"
    raise UserError(
        f"the collection has no {wanted[0]}",
        where=settings.path or "collection",
        expected=" or ".join([wanted[0], f"{wanted[0]}.gz", *wanted[1:]]),
        found=have,
        fix=_instead(settings, names, names_there),
    )


def _instead(settings: CollectionConfig, names: tuple[str, ...], have: list[str]) -> str:
    """The fix for a missing file that the names in the folder suggest."""
    plain = [name.removesuffix(".gz") for name in have]
    formats = (f for f, (passages, *_) in _NAMES.items() if f != settings.format and passages[0] in plain)
    if names is _NAMES[settings.format][0] and (other := next(formats, None)):
        return f"these files have the layout of format {other}: set collection.format: {other}"
    before, _, after = names[0].partition("{}")
    splits = [name[len(before) : -len(after)] for name in plain if after and name.startswith(before) and after in name]
    if splits and "/" not in before:
        return (
            f"collection.train names the split to train on, of {', '.join(splits)}; or `ckd-ray init DIR` splits them"
        )
    return "`ckd-ray init DIR` recognises other names; or name the file under collection.passages, .queries or .qrels"
