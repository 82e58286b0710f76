"""`Run`: a run directory as an object. Needs no Ray."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import pandas as pd

from ckd_ray.errors import UserError
from ckd_ray.evaluate.table import TABLE
from ckd_ray.files import exists, join, local_copy, read_json
from ckd_ray.inspection.inspect import find_query, inspect_at
from ckd_ray.inspection.labelled_run import LabelledRun
from ckd_ray.model import ColBERT
from ckd_ray.pipeline.export import export
from ckd_ray.pipeline.export_options import export_options
from ckd_ray.pipeline.push import check_repository, push_folder
from ckd_ray.report.page import write_report
from ckd_ray.runs.artifact import is_of, manifest_of
from ckd_ray.runs.directory import check_role
from ckd_ray.runs.finished import FinishedRun, open_finished, reading
from ckd_ray.search.searcher import Hit, IndexUse, Searcher

_COLUMNS = ["mean", "low", "high", "queries", "student_minus", "p"]


def open(run: str | os.PathLike[str]) -> Run:
    """Open an existing run: a folder, a URI (`s3://bucket/runs/mine`), or the name of a run in `runs/`.

    The folder of a student of `ckd-ray compare` or `tune` is accepted, too. A method that needs a part which the run
    does not have yet raises UserError.

    Raises:
        UserError: no run is there, or one of a later version of ckd-ray.
    """
    return Run(open_finished(os.fspath(run), "run"))


class Run:
    """A run, made by `ckd_ray.train` or opened by `ckd_ray.open`. Nothing is read before it is asked for.

    Methods raise UserError where the run has no such thing yet, and say which command makes it.
    """

    def __init__(self, finished: FinishedRun) -> None:
        self._finished = finished
        self._searchers: dict[tuple[str, str], Searcher] = {}

    def __repr__(self) -> str:
        return f"ckd_ray.open({self.folder!r})"

    @property
    def name(self) -> str:
        """The name of the folder; for a student of `compare` or `tune` with the run's name in front."""
        return self._finished.name

    @property
    def folder(self) -> str:
        """The absolute path or the URI."""
        return self._finished.paths.folder

    @property
    def config(self) -> dict[str, Any]:
        """The whole configuration, section by section, as `train` takes it. Keys in URIs are hidden."""
        found: dict[str, Any] = self._finished.record["config"]
        return found

    @property
    def measures(self) -> pd.DataFrame:
        """The closing table: a row for each split, measure and system (`encoder`, `bm25`, `teacher`, `student`).

        The columns: `mean`; `low` and `high`, its 95 % bootstrap interval; `queries`; `student_minus`, the mean
        difference of the student from this system, and `p` of its randomisation test, Holm-corrected. A student of
        `compare` or `tune` has its means alone. `run.measures["mean"].unstack("system")` is the table of means.
        """
        with reading(self.folder):
            rows = self._measures()
        names = ["split", "measure", "system"]
        return pd.DataFrame(rows, columns=[*names, *_COLUMNS]).set_index(names)

    def _measures(self) -> list[tuple[Any, ...]]:
        paths = self._finished.paths
        if manifest_of(paths.evaluation) is None or not is_of(paths.evaluation, "student", paths.student):
            raise UserError(
                "this run has no measures of its student yet",
                where=paths.evaluation,
                fix="ckd_ray.train, or ckd-ray evaluate, with the configuration of this run, makes them",
            )
        if not exists(join(paths.evaluation, TABLE)):
            by_split = read_json(join(paths.evaluation, "measures.json"))["splits"]
            return [
                (split, measure, system, mean, *[None] * (len(_COLUMNS) - 1))
                for split, systems in by_split.items()
                for system, means in systems.items()
                for measure, mean in means.items()
            ]
        rows = []
        for split, measures in read_json(join(paths.evaluation, TABLE))["splits"].items():
            for measure, row in measures.items():
                for system, cell in row["systems"].items():
                    test = row["student_minus"].get(system, {})
                    own = (cell["mean"], cell["low"], cell["high"], cell["n"], test.get("mean"), test.get("p_holm"))
                    rows.append((split, measure, system, *own))
        return rows

    def labels(self, query_ids: str | Iterable[str] | None = None, *, top: int = 10) -> Iterator[dict[str, Any]]:
        """What `ckd-ray inspect` shows of training queries: one dictionary a query, computed when the iterator asks.

        `passages` are the labelled ones and the first of the teacher's ranking: their `rank`, whether they are
        `labelled`, the scores `teacher_scores` and `collective_scores` (with the expansion and the ensemble), and the
        probabilities `one_hot`, `teacher` and `collective`. `expansion` are the centroids with `token`, `idf` and
        `weight`. Besides: `query_id`, `text`, `labelled`, `feedback` and `settings`.

        Args:
            query_ids: one id or several; None takes all training queries.
            top: passages of the ranking.

        Raises:
            UserError: no such query (names the nearest ids), or there are no labels.
        """
        with reading(self.folder):
            opened = self._labelled
            asked: Iterable[int] = range(len(opened.queries.ids))
            if query_ids is not None:
                ids = [query_ids] if isinstance(query_ids, str) else query_ids
                asked = [find_query(opened, query_id) for query_id in ids]
        return self._inspected(asked, top)

    def _inspected(self, queries: Iterable[int], top: int) -> Iterator[dict[str, Any]]:
        for query in queries:
            with reading(self.folder):
                found = inspect_at(self._labelled, query, top, words=None)
            yield found

    @cached_property
    def _labelled(self) -> LabelledRun:
        return LabelledRun.of(self._finished)

    def search(self, query: str, k: int = 10, *, system: str = "student", index: IndexUse = "use") -> list[Hit]:
        """The best `k` passages for a query, with exact scores.

        Args:
            system: `student` or `teacher`, which is loaded at the first search.
            index: how the candidates are found. `use` takes an existing index, and reads the whole store without one;
                `make` builds a missing index, for a large store; `none` always reads the whole store.

        Raises:
            UserError: the query is empty, `k` is below 1, or the run has nothing to search with.
        """
        check_role(system, "system")
        if not query.strip():
            raise UserError("the query is empty", where="query", expected="some words")
        if k < 1:
            raise UserError("too few passages", where="k", expected="1 or more", found=str(k))
        if (system, index) not in self._searchers:
            self._searchers[system, index] = Searcher(self._finished, system, index=index)
        return self._searchers[system, index].search(query, k)

    def export(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        format: str,
        what: str = "model",
        model: str | None = None,
        width: int | None = None,
        scores: str | None = None,
        bits: int | None = None,
        push: str | None = None,
    ) -> dict[str, Any]:
        """Write the model for another library, the labels as a training set, or the token embeddings of all passages
        for another search engine (see `ckd-ray export --help`). An option that would be ignored is an error.

        Args:
            folder: where to; None takes a folder below `exports/` inside the run.
            format: of a model `sentence-transformers`, `pylate`, `colbert` or `onnx`; of labels
                `sentence-transformers`, `pylate`, `colbert`, `flagembedding`, `tevatron` or `triples`; of vectors
                `parquet`; of an index `fast-plaid`.
            what: `model`, `labels`, `vectors` or `index`.
            model: `student` (the default) or `teacher`; of vectors and an index, whose they are. Not of labels.
            width, scores: of labels: candidates a query (32), and `minmax` (0 to 1 a query), `raw`, or `auto` (the
                default), which is what the format wants.
            bits: of an index from an fp16 store: 1, 2 or 4 a dimension (4).
            push: OWNER/NAME of a repository of the hub that the folder is uploaded to. A new one is private.

        Returns:
            What was written: `out`, its folder, and figures; `pushed`, the address of the repository.

        Raises:
            UserError: the run has no such part, an option does not apply to it, the folder is in use, or the hub
                rejects the upload. A malformed OWNER/NAME and a missing token are reported before anything is written.
        """
        options = export_options(what, model=model, width=width, scores=scores, bits=bits)
        if push is not None:
            check_repository(push)
        out = None if folder is None else os.fspath(folder)
        written = export(self.folder, what, format, out=out, **options)
        if push is not None:
            written["pushed"] = push_folder(written["out"], push, what)
        return written

    def report(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write one HTML page about the run to `path`, by default `report.html` inside it. Returns where it is."""
        return write_report(self._finished, None if path is None else os.fspath(path))

    @cached_property
    def student(self) -> ColBERT:
        """The student, on the CPU."""
        return self._model("student")

    @cached_property
    def teacher(self) -> ColBERT:
        """The teacher, on the CPU."""
        return self._model("teacher")

    def _model(self, role: str) -> ColBERT:
        checkpoint = self._finished.paths.checkpoint(role)
        if not exists(join(checkpoint, "colbert.json")):
            raise UserError(
                f"this run has no {role} yet", where=checkpoint, fix="ckd_ray.train, with its configuration, makes it"
            )
        with local_copy(checkpoint) as folder:
            return ColBERT.from_pretrained(folder)
