"""Where an export may be written: a place that holds anything else is never replaced."""

from __future__ import annotations

from ckd_ray.errors import UserError
from ckd_ray.files import exists, is_folder, list_files, list_folders
from ckd_ray.runs.artifact import manifest_of

# In every exported model, where it also holds what the other library has no name for.
EXPORT_FILE = "ckd_ray_export.json"
# In every set of labels. FlagEmbedding reads all files of a folder that end in .json or .jsonl as training data.
LABELS_FILE = "ckd_ray_export.txt"
# In the manifest of exported vectors and indexes.
EXPORT_KEY = "export"


def check_place(target: str) -> None:
    """Let an export be written to `target` if it is new, an empty folder, or an earlier export.

    Raises:
        UserError: the place holds something else.
    """
    if not exists(target):
        return
    if is_folder(target):
        files = list_files(target)
        held = files or list_folders(target)
        if not held or {EXPORT_FILE, LABELS_FILE} & set(files) or EXPORT_KEY in (manifest_of(target) or {}):
            return
    raise UserError(
        "this place is in use",
        where=f"--out {target}",
        expected="a new or empty folder, or an earlier export",
    )
