"""The configuration, and beside it the files that the pipeline could not read as they are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ckd_ray.config.schema import Split
from ckd_ray.data.problems import shorten
from ckd_ray.data.readers import HEADERS
from ckd_ray.errors import UserError
from ckd_ray.files import new_folder
from ckd_ray.init.facts import Facts, Label, texts_in
from ckd_ray.init.roles import Labels, Layout, Texts
from ckd_ray.init.tables import is_whole

Format = Literal["msmarco", "beir", "parquet"]
_OF_KIND: dict[str, Format] = {"tsv": "msmarco", "jsonl": "beir", "parquet": "parquet"}
_ROWS_A_BLOCK = 4096
# In the folder of new files; a folder without it is not ours to replace.
_MARK = "written-by-ckd-ray-init"


@dataclass
class Collection:
    """The section `collection`: its format, and a file for each thing.

    Attributes:
        written: the new files.
    """

    format: Format
    passages: str = ""
    queries: dict[Split, str] = field(default_factory=dict)
    qrels: dict[Split, str] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)


def write_collection(layout: Layout, facts: Facts, folder: str) -> Collection:
    """Take every file that the pipeline reads as it is, and write the others into `folder`. The format is that of the
    corpus, so that it need not be copied, else Parquet, which holds every text and every id.

    Raises:
        UserError: a TSV file would need an id with a tab or a line end.
    """
    native = _OF_KIND.get(layout.corpus.table.kind)
    fits = native is not None and _texts_fit(layout.corpus, native, ("passage_id", "pid", "id"), facts.empty)
    made = Collection(native if native is not None and fits else "parquet")
    with new_folder(folder) as scratch:
        writer = _Writer(made, scratch, folder)
        made.passages = layout.corpus.table.uri if fits else writer.texts("passages", texts_in(layout.corpus))
        for split, part in facts.parts.items():
            own = part.own_queries or (made.format == "beir" and part.own_labels)
            empty = sum(not text.strip() for text in part.queries.values())
            if own and _texts_fit(part.texts, made.format, ("query_id", "qid", "id"), empty):
                made.queries[split] = part.texts.table.uri
            else:
                made.queries[split] = writer.texts(f"queries.{split}", part.queries.items())
            if part.own_labels and _labels_fit(part.qrels, made.format):
                made.qrels[split] = part.qrels.table.uri
            else:
                made.qrels[split] = writer.labels(f"qrels.{split}", part.labels)
        Path(scratch, _MARK).touch()
    if not made.written:
        shutil.rmtree(folder)
    return made


def _texts_fit(texts: Texts, fmt: Format, id_names: tuple[str, ...], empty: int) -> bool:
    """Whether the pipeline reads the table of texts as it is, and in the same way."""
    table = texts.table
    if _OF_KIND.get(table.kind) != fmt:
        return False
    if fmt == "msmarco":
        return not table.header and table.columns == ("1", "2") and texts.id == "1" and table.separator == "\t"
    if empty:  # a null where a string is expected is refused
        return False
    if fmt == "beir":
        return texts.id == "_id" and texts.text == "text" and texts.title in (None, "title")
    first = next((name for name in id_names if name in table.columns), None)
    return texts.id == first and texts.text == "text" and texts.title is None


def _labels_fit(labels: Labels, fmt: Format) -> bool:
    table = labels.table
    if fmt == "parquet":
        grade = next((name for name in ("relevance", "grade", "score") if name in table.columns), None)
        ids = labels.query in ("query_id", "qid") and labels.passage in ("passage_id", "pid")
        sound = ids and labels.grade == grade and table.kind == "parquet"
        return sound and _are_integers(table.parts[0], str(grade))
    places = [labels.query, *table.columns[1:-2], labels.passage, labels.grade]
    if table.kind != "tsv" or len(table.columns) not in (3, 4) or places != list(table.columns):
        return False
    if table.header and (table.columns[0].strip().lower() not in HEADERS or len(table.parts) > 1):
        return False
    return all(is_whole(grade) and "." not in grade for grade in table.values(str(labels.grade)))


def _are_integers(path: str, column: str) -> bool:
    schema = pq.read_schema(path)
    return column in schema.names and pa.types.is_integer(schema.field(column).type)


@dataclass
class _Writer:
    """Writes files of the collection's format into `scratch`, which becomes `folder`."""

    made: Collection
    scratch: str
    folder: str

    def _path(self, name: str) -> str:
        self.made.written.append(os.path.join(self.folder, name))
        return os.path.join(self.scratch, name)

    def texts(self, name: str, rows: Iterable[tuple[str, str]]) -> str:
        """Write passages or queries; returns where they will be."""
        if self.made.format == "parquet":
            key = "passage_id" if name == "passages" else "query_id"
            schema = pa.schema([(key, pa.string()), ("text", pa.large_string())])
            with pq.ParquetWriter(self._path(f"{name}.parquet"), schema, compression="zstd") as out:
                for block in _blocks(rows):
                    ids, texts = zip(*block, strict=True)
                    out.write_table(pa.table([pa.array(ids), pa.array(texts, pa.large_string())], schema=schema))
        elif self.made.format == "beir":
            lines = (json.dumps({"_id": i, "text": text}, ensure_ascii=False) for i, text in rows)
            _put(self._path(f"{name}.jsonl"), lines)
        else:
            _put(self._path(f"{name}.tsv"), (f"{_cell(i)}\t{' '.join(text.splitlines())}" for i, text in rows))
        return self.made.written[-1]

    def labels(self, name: str, rows: Iterable[Label]) -> str:
        """Write qrels; returns where they will be."""
        if self.made.format == "parquet":
            columns = {"query_id": pa.array([r.query for r in rows], pa.string())}
            columns["passage_id"] = pa.array([r.passage for r in rows], pa.string())
            columns["relevance"] = pa.array([r.grade for r in rows], pa.int64())
            pq.write_table(pa.table(columns), self._path(f"{name}.parquet"))
        else:
            lines = (f"{_cell(r.query)}\t0\t{_cell(r.passage)}\t{r.grade}" for r in rows)
            _put(self._path(f"{name}.tsv"), lines)
        return self.made.written[-1]


def _blocks(rows: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    iterator = iter(rows)
    while block := list(islice(iterator, _ROWS_A_BLOCK)):
        yield block


def _put(path: str, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        out.writelines(f"{line}\n" for line in lines)


def _cell(name: str) -> str:
    if "\t" in name or len(name.splitlines()) > 1:
        fix = "write the corpus as CSV, JSON lines or Parquet, which hold such ids"
        raise UserError(
            "an id with a tab or a line end", where="DIR", expected="ids of TSV", found=shorten(name), fix=fix
        )
    return name


def check_places(output: str, data: str, folder: str, force: bool) -> None:
    """Raises UserError where a file or a folder that is not ours, or not to be replaced, would be overwritten."""
    where = f"--output {output}"
    if os.path.isdir(output):
        raise UserError("this is a folder", where=where, expected="a file to write")
    if os.path.abspath(folder) in (data, os.path.abspath(output)) or os.path.abspath(folder).startswith(f"{data}/"):
        raise UserError(
            "the new files would replace the folder that is read", where=where, found=data, fix="--output OTHER"
        )
    if os.path.exists(data) and not os.path.exists(os.path.join(data, _MARK)):
        fix = "--output OTHER, or move it away"
        raise UserError("the place of the new files is in use", where=where, found=data, fix=fix)
    for path in (output, data):
        if os.path.exists(path) and not force:
            raise UserError("this is there already", where=where, found=path, fix="--output OTHER, or --force")
