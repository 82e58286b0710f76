"""JSON files, and the signature and checksum of a file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import pyarrow.fs as pafs

from ckd_ray.errors import UserError
from ckd_ray.files.atomic import write_atomic
from ckd_ray.files.paths import exists, filesystem_of, is_local, last_part, parent

# Between attempts to read a remote file that is not valid JSON: a client cannot tell a truncated file from a whole one.
_PAUSES_S = (0.1, 0.5, 2.0)
# From this many files of one folder on, they are looked up by one listing of the folder.
_LISTED_FROM = 16


def write_json_atomic(uri: str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    data = (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    write_atomic(uri, lambda stream: stream.write(data))


def read_json(uri: str) -> Any:
    """The JSON value in the file `uri`. A remote file that is not valid JSON is read again, for the storage may have
    given a part of it.

    Raises:
        UserError: the file is not valid JSON.
    """
    fs, path = filesystem_of(uri)
    for pause in (*(() if is_local(uri) else _PAUSES_S), None):
        with fs.open_input_stream(path) as stream:
            data = stream.read()
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            if pause is None:
                fix = "delete it and run again"
                if not is_local(uri):
                    fix = "run again, as the storage may have given a part of it; if that does not help, delete it"
                raise UserError("not valid JSON", where=uri, found=str(error), fix=fix) from error
            time.sleep(pause)


def read_object(uri: str) -> dict[str, Any]:
    """The JSON object in the file `uri`; UserError when the file holds anything else."""
    value = read_json(uri)
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError("not a JSON object", where=uri, found=f"a {kind}", fix="delete it and run again")
    return value


def file_signature(uri: str) -> list[int]:
    """Size and time of change (ns) of a file, which differ when the file is written again.

    Raises:
        UserError: it is not there, or is a folder.
    """
    fs, path = filesystem_of(uri)
    info = fs.get_file_info(path)
    if info.type != pafs.FileType.File:
        found = "a folder" if info.type == pafs.FileType.Directory else None
        raise UserError("this file does not exist", where=uri, found=found)
    return [int(info.size), int(info.mtime_ns or 0)]


def signatures(uris: Sequence[str]) -> list[tuple[str, int | None, int | None]]:
    """(path, size, time of change in ns) of each file. Many files of one folder cost one request of an object store."""
    folders: dict[str, list[str]] = {}
    for uri in uris:
        folders.setdefault(parent(uri), []).append(last_part(uri))
    found: dict[tuple[str, str], tuple[str, int | None, int | None]] = {}
    for folder, names in folders.items():
        fs, path = filesystem_of(folder)
        paths = [f"{path.rstrip('/')}/{name}" for name in names]
        infos = fs.get_file_info(paths if len(paths) < _LISTED_FROM else pafs.FileSelector(path))
        found |= {(folder, info.base_name): (info.path, info.size, info.mtime_ns) for info in infos}
    return [found[parent(uri), last_part(uri)] for uri in uris]


def sha256_of(uri: str) -> str:
    """SHA-256 of a file's bytes, read in blocks of 8 MiB."""
    fs, path = filesystem_of(uri)
    digest = hashlib.sha256()
    with fs.open_input_stream(path) as stream:
        while block := stream.read(1 << 23):
            digest.update(block)
    return digest.hexdigest()


def has_digest(uri: str, digest: str) -> bool:
    """True when the file is there and has this SHA-256."""
    return exists(uri) and sha256_of(uri) == digest
