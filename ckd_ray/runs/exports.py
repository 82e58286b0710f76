"""Where an export may be written: a place that holds anything else is never replaced."""

from __future__ import annotations

from ckd_ray.errors import UserError
from ckd_ray.files import exists, is_folder, list_files, list_folders
from ckd_ray.runs.artifact import manifest_of

# Lies in every exported model, where it also holds what the other library has no name for, and in every set of labels.
# Exported vectors and indexes have `EXPORT_KEY` in their manifest.
EXPORT_FILE, EXPORT_KEY = "ckd_ray_export.json", "export"


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
        if not held or EXPORT_FILE in files or EXPORT_KEY in (manifest_of(target) or {}):
            return
    raise UserError(
        "this place is in use",
        where=f"--out {target}",
        expected="a new or empty folder, or an earlier export",
    )
