"""The directory of a run: `RunDir` alone knows the names of its folders, `RunContext` adds the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckd_ray.config import Config
from ckd_ray.errors import UserError
from ckd_ray.files import filesystem_of, join
from ckd_ray.runs.fingerprint import fingerprint
from ckd_ray.tracking import Tracking

LABELS, COMPARE, TUNE = "labels", "compare", "tune"
# In `corpus` the outside ids of all passages; below `queries` the labels. Programs that read these folders as tables
# pass over names that begin with `_`.
PASSAGE_IDS, QRELS = "_ids.arrow", "_qrels"
# The models of a run.
ROLES = ("student", "teacher")
# The winner of a search is a variant of the run.
BEST = f"{TUNE}/best"


class _Shared:
    """A folder that the run and all of its variants share."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunDir, owner: object = None) -> str:
        return join(run.root, self.name)


class _Own(_Shared):
    """A folder or file that a variant has for itself."""

    def __get__(self, run: RunDir, owner: object = None) -> str:
        return join(run.folder, self.name)


@dataclass(frozen=True)
class RunDir:
    """The paths of one run; nothing is read or written.

    Attributes:
        root: the absolute path or URI of the run directory.
        variant_name: a folder below it for another student (of another objective or seed), which shares the collection,
            teacher, embeddings, rankings and labels of the run; empty for the run's own student.
        labels_name: the folder of the labels below `root`; a search keeps labels of other settings in others.
    """

    root: str
    variant_name: str = ""
    labels_name: str = LABELS

    corpus = _Shared("corpus")
    queries = _Shared("queries")
    teacher = _Shared("teacher")
    embeddings = _Shared("embeddings")
    rankings = _Shared("rankings")
    ensemble = _Shared("ensemble")
    cross_scores = _Shared("cross_scores")
    baselines = _Shared("baselines")
    encoder_embeddings = _Shared("baselines/encoder_embeddings")
    checkpoints = _Shared("checkpoints")
    index = _Shared("index")
    compare = _Shared(COMPARE)
    tune = _Shared(TUNE)
    student = _Own("student")
    student_embeddings = _Own("student_embeddings")
    evaluation = _Own("evaluation")
    exports = _Own("exports")
    record = _Own("run.json")
    report = _Own("report.html")
    tracking = _Own("tracking")
    search = _Own("search_index")

    @property
    def folder(self) -> str:
        """Where the student and its evaluation are: `root`, or a folder below it for a variant."""
        return join(self.root, self.variant_name) if self.variant_name else self.root

    @property
    def labels(self) -> str:
        """The labels that the student is distilled from."""
        return join(self.root, self.labels_name)

    @property
    def passages(self) -> str:
        """The store of the corpus under the teacher."""
        return passage_store(self.embeddings)

    def query_embeddings(self, split: str) -> str:
        """The store of a split's queries under the teacher."""
        return query_store(self.embeddings, split)

    def checkpoint(self, role: str) -> str:
        """The finished `student` or `teacher`."""
        return {"student": self.student, "teacher": self.teacher}[role]

    def embeddings_of(self, role: str) -> str:
        """The folder with the stores that were made with the `student` or `teacher`."""
        return {"student": self.student_embeddings, "teacher": self.embeddings}[role]

    def search_index(self, role: str) -> str:
        """The index by which `ckd-ray search` finds candidates in a large store."""
        return join(self.search, role)

    def baseline(self, name: str) -> str:
        """Where the measures of a baseline are."""
        return join(self.baselines, name)

    def training_checkpoints(self, stage: str, fingerprint: str) -> str:
        """The checkpoints of a training; they are deleted when its stage is finished."""
        return join(self.checkpoints, f"{stage}-{fingerprint[:16]}")

    @property
    def extras(self) -> tuple[str, ...]:
        """Folders that belong to the run without being the output of a stage."""
        return (
            self.queries, self.student_embeddings, self.checkpoints, self.index, self.exports, self.compare, self.tune,
            self.baselines, self.tracking, self.search,
        )  # fmt: skip

    def variant(self, name: str) -> RunDir:
        """The same run with another student."""
        return replace(self, variant_name=name)

    def with_labels(self, name: str) -> RunDir:
        """The same run with other labels."""
        return replace(self, labels_name=name)


def check_role(role: str, where: str, what: str = "system") -> None:
    """Raises UserError for what is neither a student nor a teacher."""
    if role not in ROLES:
        raise UserError(f"unknown {what}", where=where, expected=" or ".join(ROLES), found=role)


def passage_store(embeddings: str) -> str:
    """The store of the corpus in a folder of embeddings."""
    return join(embeddings, "passages")


def query_store(embeddings: str, split: str) -> str:
    """The store of a split's queries in a folder of embeddings."""
    return join(embeddings, f"queries.{split}")


def system_rankings(measured: str, system: str) -> str:
    """The rankings of a system in the folder where it is measured (`evaluation`, `baselines/NAME`)."""
    return join(measured, "rankings", system)


def labels_name(label: Mapping[str, Any]) -> str:
    """A name for the folder of labels of these settings (a section `label`), the same for all that share them."""
    return f"labels-{fingerprint(label=dict(label))[:12]}"


def labels_folder(label: Mapping[str, Any]) -> str:
    """Where a search keeps labels of other settings than the run's, below the run."""
    return f"{TUNE}/{labels_name(label)}"


@dataclass(frozen=True)
class RunContext:
    """What every stage is given: the configuration and the paths of its run, and the trackers, which are told of it."""

    config: Config
    paths: RunDir
    tracking: Tracking = field(default_factory=Tracking, compare=False)

    @classmethod
    def of(cls, config: Config, variant: str | None = None, labels: str = LABELS) -> RunContext:
        """The run directory is `run.storage`/`run.name`; see `RunDir` for `variant` and `labels`."""
        storage = config.run.storage
        if "://" not in storage:
            storage = filesystem_of(storage)[1]
        return cls(config, RunDir(join(storage, config.run.name), variant or "", labels))
