"""The store of a finished run's passages, checked to be of the student or teacher that is there."""

from __future__ import annotations

from ckd_ray.errors import UserError
from ckd_ray.files import exists, join
from ckd_ray.runs.artifact import is_finished, is_of
from ckd_ray.runs.directory import passage_store
from ckd_ray.runs.finished import FinishedRun, reading
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.writing import MANIFEST


def stored_passages(run: FinishedRun, system: str = "student") -> EmbeddingStore:
    """The store of the corpus under the run's student or teacher.

    Raises:
        UserError: it has not been made yet, or is of another model than the one that is there now.
    """
    paths = run.paths
    folder, checkpoint = paths.embeddings_of(system), paths.checkpoint(system)
    stage = "embed" if system == "teacher" else "evaluate"
    for needed in (join(checkpoint, "colbert.json"), join(passage_store(folder), MANIFEST)):
        if not exists(needed):
            raise UserError(
                f"this run has no {system} to search with yet",
                where=paths.folder,
                expected=needed,
                fix=f"ckd-ray {stage}, with the configuration of this run, makes it",
            )
    if is_finished(checkpoint) and not is_of(folder, system, checkpoint):
        raise UserError(
            f"the {system} of this run was trained again after its passages were embedded",
            where=paths.folder,
            expected=f"embeddings of the {system} that is there now",
            fix=f"ckd-ray {stage}, with its configuration, makes them",
        )
    with reading(paths.folder):
        return EmbeddingStore.open(passage_store(folder))
