"""Folders of a run that more than one command reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckd_ray.runs.fingerprint import fingerprint

FOLDER = "tune"  # below the run


def labels_name(label: Mapping[str, Any]) -> str:
    """The folder's name for labels of these settings (a section `label`), the same for all that share them."""
    return f"labels-{fingerprint(label=dict(label))[:12]}"


def labels_folder(label: Mapping[str, Any]) -> str:
    """Where a search keeps labels of other settings than the run's, below the run."""
    return f"{FOLDER}/{labels_name(label)}"
