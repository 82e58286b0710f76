"""Opening the directory of a run that is there already, by the path that a user gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ckd_ray.errors import UserError, first_line
from ckd_ray.files import exists, filesystem_of, join, last_part, list_folders, parent
from ckd_ray.runs.directory import RunDir
from ckd_ray.runs.record import labels_of, read_record


@dataclass(frozen=True)
class FinishedRun:
    """A run directory, or that of a variant of a run (RUN/compare/OBJECTIVE-SEED, RUN/tune/best).

    Attributes:
        paths: its folders; `paths.folder` is what the user named.
        record: `run.json` of that folder.
    """

    paths: RunDir
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name; for a variant with the run's in front."""
        own = last_part(self.paths.folder)
        return f"{last_part(self.paths.root)}/{own}" if self.paths.variant_name else own


def open_finished(run: str, where: str = "RUN") -> FinishedRun:
    """The run at `run`: a path, a URI, or the name of one in `runs/`.

    Raises:
        UserError: no run is there, or one of a later version of ckd-ray.
    """
    tried = [run.rstrip("/") if "://" in run else filesystem_of(run)[1]]
    if "://" not in run and "/" not in run:
        tried.append(filesystem_of(join("runs", run))[1])
    for folder in tried:
        if exists(path := RunDir(folder).record):
            record = read_record(path)
            return FinishedRun(_paths(folder, record), record)
    found = "nothing" if not exists(tried[0]) else f"folders {', '.join(list_folders(tried[0])[:8]) or 'none'}"
    raise UserError(
        "no run here",
        where=f"{where} {run}",
        expected="a run directory (run.storage/run.name), which holds run.json",
        found=found,
        fix="ckd-ray train makes one",
    )


def _paths(folder: str, record: dict[str, Any]) -> RunDir:
    """The paths of the run or variant at `folder`; the record of a variant says how far below its run it is."""
    root, names = folder, list[str]()
    for _ in filter(None, str(record.get("variant") or "").split("/")):
        names.insert(0, last_part(root))
        root = parent(root)
    paths = RunDir(root, "/".join(names))
    return paths.with_labels(labels_of(paths, record))


@contextmanager
def reading(run: str) -> Iterator[None]:
    """Turn what goes wrong while the files of a run are read into a UserError that names the run, whatever library
    met it first: the files may have come from anywhere."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError, pa.ArrowException) as error:
        raise UserError(
            "a file of this run is missing, or is not what ckd-ray writes",
            where=run,
            found=f"{type(error).__name__}: {first_line(error, 400)}",
            fix="ckd-ray train, with the configuration of this run, makes missing files again; --from STAGE others",
        ) from error
