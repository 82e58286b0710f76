"""Collections by their `ir_datasets` id. The package is an extra: pip install 'ckd-ray[ir]'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ckd_ray.config import CollectionConfig
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.data.readers import QrelRow, TextRow, read_grade
from ckd_ray.data.sources import SPLITS, Source
from ckd_ray.errors import UserError, first_line


def ir_datasets_source(settings: CollectionConfig) -> Source:
    """`path` is the corpus (msmarco-passage); a split is `path/NAME`, as named by collection.train, dev, test.

    A split's name may also be a whole id (msmarco-passage/dev/small).
    """
    try:
        import ir_datasets
    except ImportError as error:
        raise UserError(
            "ir_datasets is not installed", where="collection.format", fix="pip install 'ckd-ray[ir]'"
        ) from error
    base = str(settings.path)
    corpus = _load(ir_datasets, base)
    if not corpus.has_docs():
        raise UserError("this id has no passages", where="collection.path", found=base)
    parts: dict[str, Any] = {}
    for split in SPLITS:
        name = getattr(settings, split)
        wanted = name if name == base or name.startswith(f"{base}/") else f"{base}/{name}"
        try:
            part = _load(ir_datasets, wanted)
        except UserError:
            if split == "train":
                raise
            continue
        if part.has_queries() and part.has_qrels():
            parts[split] = part
        elif split == "train":
            raise UserError(
                "this id has no queries with labels", where="collection.train", found=wanted, fix="name another split"
            )
    return Source(
        passages=lambda problems: _texts(base, corpus.docs_iter, "doc_id", problems),
        queries=lambda split, problems: _texts(f"{base} {split}", parts[split].queries_iter, "query_id", problems),
        qrels=lambda split, problems: _qrels(f"{base} {split}", parts[split].qrels_iter, problems),
        splits=tuple(parts),
        files=(),
    )


def _load(ir_datasets: Any, name: str) -> Any:
    try:
        return ir_datasets.load(name)
    except KeyError:
        raise UserError("ir_datasets knows no such id", where="collection.path", found=name) from None


def _rows(where: str, open_rows: Callable[[], Iterable[Any]]) -> Iterator[tuple[int, Any]]:
    """Numbered rows; errors of ir_datasets (no network, a data set to be downloaded by hand) become UserErrors."""
    try:
        yield from enumerate(open_rows(), 1)
    except UserError:
        raise
    except Exception as error:  # its parsers raise errors of any kind
        raise UserError("ir_datasets cannot read this data set", where=where, found=first_line(error)) from error


def _texts(where: str, open_rows: Callable[[], Iterable[Any]], id_field: str, problems: Problems) -> Iterator[TextRow]:
    for number, row in _rows(where, open_rows):
        text = row.default_text() if hasattr(row, "default_text") else row.text
        name, place = str(getattr(row, id_field)), f"{where}: row "
        if isinstance(text, str):
            yield TextRow(name, text, place, number)
        else:
            problems.add(f"{place}{number}", "no text", expected="a string", found=shorten(str(text)))


def _qrels(where: str, open_rows: Callable[[], Iterable[Any]], problems: Problems) -> Iterator[QrelRow]:
    for number, row in _rows(where, open_rows):
        grade = read_grade(row.relevance, f"{where}: row {number}", problems)
        if grade is not None:
            yield QrelRow(str(row.query_id), str(row.doc_id), grade, f"{where}: row ", number)
