"""The passages that a training leaves out, because the encoder fails on them every time.

A file beside the checkpoints lists the passages that this training has found itself (suspects.py). The file changes
only between two attempts, so that all workers read the same list.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckd_ray.data import Collection
from ckd_ray.distill.task import TrainingTask
from ckd_ray.embed.bad_texts import Entry
from ckd_ray.files import exists, join, read_object, write_json_atomic
from ckd_ray.runs.artifact import manifest_of

_FILE = "set-aside.json"


def left_out(task: TrainingTask) -> list[Entry]:
    """All passages that the training leaves out, ascending by index: those that it has found itself and, for a student,
    those that the teacher's training and the embed stage have set aside."""
    found: dict[int, Entry] = {}
    earlier = {"teacher": task.paths.teacher, "embed": task.paths.embeddings} if task.distillation else {}
    for stage, folder in earlier.items():
        ids = ((manifest_of(folder) or {}).get("figures") or {}).get("set_aside")
        for name, index in Collection.open(task.run).passage_index(ids).items() if ids else ():
            found[index] = {"index": index, "passage_id": name, "cause": f"set aside by {stage}"}
    path = join(task.checkpoints, _FILE)
    found |= {entry["index"]: entry for entry in (read_object(path)["passages"] if exists(path) else ())}
    return [found[index] for index in sorted(found)]


def leave_out(task: TrainingTask, entries: Sequence[Entry]) -> None:
    """Leave these passages out from the next attempt on; they replace the list of this training."""
    write_json_atomic(join(task.checkpoints, _FILE), {"passages": list(entries)})
