"""Opening the directory of a run that is there already, by the path that a user gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ckd_ray.errors import UserError, first_line
from ckd_ray.files import exists, filesystem_of, join, last_part, list_folders, parent, read_object


@dataclass(frozen=True)
class FinishedRun:
    """A run directory, or that of a variant of a run (RUN/compare/OBJECTIVE-SEED, RUN/tune/best).

    Attributes:
        folder: what the user named; student, evaluation and run.json are here.
        base: the run that holds collection, teacher, embeddings, rankings and labels; the same but for a variant.
        record: `run.json`.
    """

    folder: str
    base: str
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name; for a variant with the run's in front."""
        own = last_part(self.folder)
        return own if self.folder == self.base else f"{last_part(self.base)}/{own}"

    def path(self, *parts: str) -> str:
        """A path below the run (of a variant: its own part)."""
        return join(self.folder, *parts)


def open_finished(run: str, where: str = "RUN") -> FinishedRun:
    """The run at `run`: a path, a URI, or the name of one in `runs/`.

    Raises:
        UserError: no run is there.
    """
    tried = [run.rstrip("/") if "://" in run else filesystem_of(run)[1]]
    if "://" not in run and "/" not in run:
        tried.append(filesystem_of(join("runs", run))[1])
    for folder in tried:
        if exists(join(folder, "run.json")):
            record = read_object(join(folder, "run.json"))
            if not isinstance(record.get("config", {}), dict):
                raise UserError("not the record of a run", where=join(folder, "run.json"), expected="a section config")
            base = folder
            for _ in filter(None, (record.get("variant") or "").split("/")):
                base = parent(base)
            return FinishedRun(folder, base, record)
    found = "nothing" if not exists(tried[0]) else f"folders {', '.join(list_folders(tried[0])[:8]) or 'none'}"
    raise UserError(
        "no run here",
        where=f"{where} {run}",
        expected="a run directory (run.storage/run.name), which holds run.json",
        found=found,
        fix="ckd-ray train makes one",
    )


@contextmanager
def reading(run: str) -> Iterator[None]:
    """While the files of a run are read, which may have come from anywhere: what is wrong with them becomes a UserError
    that names the run, whatever the library says that has met it first."""
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
