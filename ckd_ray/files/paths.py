"""Paths and URIs: which file system is behind one, what is there, and deleting it.

A path is local, or a URI that `pyarrow.fs` opens (`s3://`, `gs://`, `file://`), or a data set of the hub (`hf://`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from ckd_ray.errors import UserError, first_line

HUB = "hf://"
# Pauses between attempts double up to 20 s, so this many outlast 45 s without the object store (S3).
_ATTEMPTS = 8
# What to do where an object store does not answer, or refuses.
KEYS = (
    "check the bucket's name, the network and the keys: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the"
    " role of the machine (docs/how-to/object-storage.md)"
)


def filesystem_of(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system behind `uri` and the path inside it; a plain path (also ~/...) is a local file, made absolute."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if uri.startswith(HUB):
        return _hub(uri)
    try:
        place, options = _split_options(uri)
        bucket, _, key = place.removeprefix("s3://").partition("/")
        if uri.startswith("s3://") and bucket:
            # The path is parsed from a file:// URI, because parsing the s3:// URI would make another client.
            path = pafs.FileSystem.from_uri(f"file:///{bucket.rpartition('@')[2]}/{key}")[1]
            return _s3_client(f"s3://{bucket}{options}", os.getpid()), path.strip("/")
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(
            "this storage cannot be opened",
            where=uri,
            expected="a local path or a URI that pyarrow.fs knows: file://, s3://, gs://, hdfs://, hf://",
            found=first_line(error),
            fix=KEYS if uri.startswith(("s3://", "gs://", "gcs://")) else None,
        ) from error


@lru_cache(maxsize=16)
def _s3_client(bucket: str, process: int) -> pafs.FileSystem:
    """One client a bucket and process; all operations share its connections. A fork cannot use its parent's client."""
    fs, _ = pafs.FileSystem.from_uri(bucket)
    (options,) = fs.__reduce__()[1]
    return _patient(options)


class _PatientS3(pafs.S3FileSystem):  # type: ignore[misc]
    """Repeats a failed request for most of a minute; pyarrow's own class gives up after two seconds. A pickled copy, as
    in a training worker, keeps the retries; a copy of pyarrow's class would lose them."""

    def __reduce__(self) -> Any:
        return _patient, super().__reduce__()[1]


def _patient(options: dict[str, Any]) -> _PatientS3:
    return _PatientS3(**options, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS))


def _hub(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of the hub, which huggingface_hub has for fsspec. Older versions of pyarrow do not open it."""
    import fsspec

    try:
        fs, path = fsspec.url_to_fs(uri)
    except (ImportError, ValueError, OSError, NotImplementedError) as error:
        fix = "pip install huggingface_hub" if isinstance(error, ImportError) else None
        expected = "hf://datasets/OWNER/NAME/PATH"
        found = first_line(error)
        raise UserError(
            "this place on the hub cannot be opened", where=uri, expected=expected, found=found, fix=fix
        ) from error
    return pafs.PyFileSystem(_HubHandler(fs)), path


class _HubHandler(pafs.FSSpecHandler):  # type: ignore[misc]
    """Raises UserError when the hub cannot be reached, in the first request: whether a file is there."""

    def get_file_info(self, paths: list[str]) -> Any:
        """As FSSpecHandler's."""
        try:
            return super().get_file_info(paths)
        except Exception as error:  # of the network, of the hub, of fsspec
            raise UserError("the hub cannot be read", where=f"{HUB}{paths[0]}", found=first_line(error)) from error


def is_local(uri: str) -> bool:
    """True when `uri` names a file of this machine, so that it can be renamed and memory-mapped."""
    return isinstance(filesystem_of(uri)[0], pafs.LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` appended; options of a URI (`?scheme=http`) stay at its end."""
    path, options = _split_options(uri)
    return "/".join([path.rstrip("/"), *parts]) + options


def parent(uri: str) -> str:
    """The folder that holds `uri`."""
    path, options = _split_options(uri)
    return path.rstrip("/").rpartition("/")[0] + options


def last_part(uri: str) -> str:
    """The name of the file or folder itself, without the options of a URI."""
    return _split_options(uri)[0].rstrip("/").rpartition("/")[2]


def with_ending(uri: str, ending: str) -> str:
    """`uri` with `ending` at the end of its name."""
    path, options = _split_options(uri)
    return path.rstrip("/") + ending + options


def _split_options(uri: str) -> tuple[str, str]:
    """A question mark in a URI starts the options of the file system; a local path may hold one."""
    path, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return path, mark + options


def exists(uri: str) -> bool:
    """True when `uri` is a file or a folder."""
    fs, path = filesystem_of(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def first_present(*uris: str) -> str:
    """The first URI that exists, else the first one; for files that had another name in earlier versions."""
    return next((uri for uri in uris if exists(uri)), uris[0])


def is_folder(uri: str) -> bool:
    """True when `uri` is a folder; on object stores, when there are objects below it and none of its own name."""
    fs, path = filesystem_of(uri)
    return fs.get_file_info(path).type == pafs.FileType.Directory


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Names (not paths) of the files right below `uri` that end with `suffix`, sorted; a missing folder is empty."""
    return [name for name in _list(uri, pafs.FileType.File) if name.endswith(suffix)]


def list_folders(uri: str) -> list[str]:
    """Names of the folders right below `uri`, sorted; a missing folder is empty."""
    return _list(uri, pafs.FileType.Directory)


def file_sizes(uri: str, *, missing_ok: bool = True) -> dict[str, int]:
    """Bytes of every file below the folder `uri`, by its path in it, sorted; one listing, however many there are.

    Args:
        missing_ok: a missing folder is empty; else FileNotFoundError.
    """
    fs, path = filesystem_of(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=missing_ok, recursive=True))
    files = (info for info in infos if info.type == pafs.FileType.File)
    return dict(sorted((info.path[len(path.rstrip("/")) + 1 :], int(info.size)) for info in files))


def _list(uri: str, kind: pafs.FileType) -> list[str]:
    fs, path = filesystem_of(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == kind)


def make_folder(uri: str) -> None:
    """Create the folder `uri` and those above it."""
    fs, path = filesystem_of(uri)
    fs.create_dir(path, recursive=True)


def delete(uri: str) -> None:
    """Remove a file, or a folder and its contents; a missing one is no error."""
    fs, path = filesystem_of(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


def delete_inside(folder: str, name: str) -> None:
    """Remove the file `name` (a path in `folder`).

    Raises:
        UserError: the name, or a link on the way, leads out of the folder; then nothing is removed.
    """
    check_inside([name], folder)
    uri = join(folder, name)
    if is_local(folder):
        base, target = (os.path.realpath(filesystem_of(u)[1]) for u in (folder, parent(uri)))
        if os.path.commonpath([base, target]) != base:
            fix = "delete the file yourself if it is yours, and run again"
            raise UserError("a link leads out of its folder", where=uri, found=target, fix=fix)
    delete(uri)


def check_inside(names: Iterable[str], where: str) -> None:
    """Raises UserError for a name that leads out of its folder. Anybody may have written the names in a manifest and
    the keys in an object store."""
    for name in names:
        parts = name.replace("\\", "/").split("/")
        if not name or "\0" in name or ".." in parts or parts[0] == "":
            raise UserError(
                "a name leads out of its folder",
                where=where,
                expected="names of files below it",
                found=repr(name[:80]),
                fix="this was not written by ckd-ray: do not use it",
            )
