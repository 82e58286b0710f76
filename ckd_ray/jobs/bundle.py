"""What travels with a job: this version of the package and the configuration, and never a secret.

The machines of a cluster have the dependencies installed. The package comes with the job, in one small archive that Ray
unpacks on every node. Relative paths of a job lie below `~/ckd-ray` on the node where it runs.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml

from ckd_ray.config import Config
from ckd_ray.errors import UserError
from ckd_ray.jobs.launcher_file import LauncherFile
from ckd_ray.jobs.placeholders import check_config_filled_in, texts
from ckd_ray.progress import say, without_secrets

HOME = "~/ckd-ray"
CONFIG_NAME = "job.yaml"
_LEFT_OUT = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
_SECRET_OPTION = re.compile(r"secret|token|password|access_key|account_key|credential|sas|signature", re.IGNORECASE)
# Keys whose value is a file or folder, a hub id, or a package.
_MODELS = ("model.backbone", "teacher.checkpoint", "cross_encoder.model")


def write_bundle(config: Config, path: Path) -> None:
    """A zip with the folder `ckd_ray` and the resolved configuration."""
    import ckd_ray

    base = Path(ckd_ray.__file__).parent
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(base.rglob("*")):
            inside = file.relative_to(base.parent)
            if file.is_file() and not _LEFT_OUT & set(inside.parts) and file.suffix not in (".pyc", ".pyo"):
                _add(archive, inside.as_posix(), file.read_bytes(), 0o644)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        _add(archive, CONFIG_NAME, text.encode(), 0o600)


def _add(archive: zipfile.ZipFile, name: str, content: bytes, mode: int) -> None:
    """All entries have the date of a new ZipInfo, so the same files make the same archive."""
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
    archive.writestr(info, content)


def check_for_job(config: Config, arguments: dict[str, Any], launcher: LauncherFile | None) -> None:
    """Refuse what cannot work on another machine, before anything starts or costs money.

    Args:
        arguments: the options of the command and their values.
        launcher: the cluster's file, where there is one.

    Raises:
        UserError: a value is not filled in, a URI holds a key, or a path has no meaning there.
    """
    check_config_filled_in(config)
    for key, value in [*texts(config.model_dump(mode="json")), *arguments.items()]:
        if isinstance(value, str) and holds_secret(value):
            raise UserError(
                "a key in a URI would be stored on the cluster, where everybody can read it",
                where=key,
                found=without_secrets(value) if "@" in value else value.partition("?")[0] + "?...",
                fix="leave it out; give the machines the right to the storage (an instance profile, a service"
                " account), or set AWS_ACCESS_KEY_ID and the like where Ray is started on them",
            )
    for key, value in input_paths(config):
        if not value.startswith("/") and "://" not in value:
            raise UserError(
                "this path is relative, and has no meaning on another machine",
                where=key,
                expected="an absolute path that all nodes see, a hub id, or package:NAME/FOLDER"
                if key in _MODELS  # these are loaded by libraries that read no URIs
                else "an absolute path that all nodes see, or a URI such as s3://bucket/folder",
                found=value,
            )
    _check_paths_of_options(config.run.storage, arguments, launcher)
    _check_storage(config, launcher)


def _check_paths_of_options(storage: str, arguments: dict[str, Any], launcher: LauncherFile | None) -> None:
    """`--suggest` is written and `--against` is read by the job, on the head."""
    rented = launcher is not None and not launcher.own_machines
    for option, problem in (
        ("suggest", "the head of the cluster would write this file, and it would stay there"),
        ("against", "the head of the cluster would look for this run, and does not have it"),
    ):
        value = arguments.get(option)
        if not value or "://" in value:
            continue
        shared = value.startswith("/") and (not rented or storage.startswith("/"))
        in_storage = option == "against" and not value.startswith("/") and not storage.startswith("/")
        if not shared and not (in_storage and "://" not in storage):
            raise UserError(
                problem,
                where=f"--{option}",
                expected="a URI such as s3://bucket/folder, or an absolute path of a file system that the head shares",
                found=value,
            )


def _check_storage(config: Config, launcher: LauncherFile | None) -> None:
    storage = config.run.storage
    if "://" in storage:
        return
    relative = not storage.startswith("/")
    rented = launcher is not None and not launcher.own_machines
    alone = launcher is not None and launcher.most_nodes == 1
    if relative and rented and not alone:
        raise UserError(
            "the workers of this cluster cannot see a folder of the head",
            where="run.storage",
            expected="a URI such as s3://bucket/runs, or the absolute path of a shared file system",
            found=storage,
            fix="--set run.storage=s3://bucket/runs",
        )
    place = f"{HOME}/{storage}" if relative else storage
    if alone or relative:
        say(f"run.storage: {place} on the head node; it is lost with the machine")
    elif rented:
        say(f"run.storage: {place} must be a shared file system that every node mounts")


def input_paths(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path or URI) of every file and folder that the configuration reads, without hub ids and packages."""
    c = config.collection
    if c.path and c.format not in ("docstrings", "ir_datasets"):
        yield "collection.path", c.path
    if c.passages:
        yield "collection.passages", c.passages
    for name in ("queries", "qrels"):
        for split, path in getattr(c, name).items():
            yield f"collection.{name}.{split}", path
    if config.cross_encoder.scores:
        yield "cross_encoder.scores", config.cross_encoder.scores
    for key in _MODELS:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value and not value.startswith("package:") and (value.startswith(("/", ".", "~")) or Path(value).exists()):
            yield key, value


def holds_secret(text: str) -> bool:
    """Whether the text is a URI with a key in front of its host or in its options."""
    if "://" not in text:
        return False
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    if "@" in parts.netloc and (":" in parts.netloc.rpartition("@")[0] or parts.scheme in ("s3", "gs")):
        return True
    return any(_SECRET_OPTION.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True))
