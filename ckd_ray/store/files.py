"""Files of a run directory, local or on any URI that `pyarrow.fs` opens (`s3://`, `gs://`, `file://`).

Nothing here ever leaves a half-written file under its final name: local files are written aside, flushed to the
disk and renamed; an object store makes an upload visible only when it is complete. What a killed writer has left aside
is removed by `remove_stale`, which a stage calls before it starts (pipeline/artefact.py).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
from safetensors import SafetensorError

from ckd_ray.errors import JobError, UserError

# Stands in the name of everything that is still being written.
_ASIDE = ".tmp-"
# With pauses that double up to 20 s, so many attempts outlast three quarters of a minute without the object store (S3).
_ATTEMPTS = 8
# So many files of one folder are looked up by a listing of it.
_LISTED_FROM = 16
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def filesystem_of(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system behind `uri` and the path inside it; a plain path (also ~/...) is a local file, made absolute."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return _patient(*pafs.FileSystem.from_uri(uri))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(
            "this storage cannot be opened",
            where=uri,
            expected="a local path or a URI that pyarrow.fs knows: file://, s3://, gs://, hdfs://",
            found=str(error).splitlines()[0],
        ) from error


def _patient(fs: pafs.FileSystem, path: str) -> tuple[pafs.FileSystem, str]:
    """The same; on S3 with more attempts a request than the three of a URI, which are over in two seconds."""
    if not isinstance(fs, pafs.S3FileSystem):
        return fs, path
    (options,) = fs.__reduce__()[1]
    return pafs.S3FileSystem(**options, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)), path


def is_local(uri: str) -> bool:
    """True when `uri` names a file of this machine, so that it can be renamed and memory-mapped."""
    return isinstance(filesystem_of(uri)[0], pafs.LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` appended, slashes put where they belong; options of a URI (`?scheme=http`) stay at its end."""
    path, options = _split_options(uri)
    return "/".join([path.rstrip("/"), *parts]) + options


def parent(uri: str) -> str:
    """The folder that holds `uri`."""
    path, options = _split_options(uri)
    return path.rstrip("/").rpartition("/")[0] + options


def last_part(uri: str) -> str:
    """The name of the file or folder itself, without the options of a URI."""
    return _split_options(uri)[0].rstrip("/").rpartition("/")[2]


def beside(uri: str, ending: str) -> str:
    """`uri` with `ending` at the end of its name."""
    path, options = _split_options(uri)
    return path.rstrip("/") + ending + options


def _split_options(uri: str) -> tuple[str, str]:
    """A local path may hold a question mark; in a URI it starts the options of the file system."""
    path, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return path, mark + options


def exists(uri: str) -> bool:
    """True when `uri` is a file or a folder."""
    fs, path = filesystem_of(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def is_folder(uri: str) -> bool:
    """True when `uri` is a folder; on object stores, when there are objects below it and none of its own name."""
    fs, path = filesystem_of(uri)
    return fs.get_file_info(path).type == pafs.FileType.Directory


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Names (not paths) of the files right below `uri` that end with `suffix`, sorted; a missing folder is empty."""
    fs, path = filesystem_of(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(i.base_name for i in infos if i.type == pafs.FileType.File and i.base_name.endswith(suffix))


def list_folders(uri: str) -> list[str]:
    """Names of the folders right below `uri`, sorted; a missing folder is empty."""
    fs, path = filesystem_of(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory)


def make_folder(uri: str) -> None:
    """Create the folder `uri` and those above it."""
    fs, path = filesystem_of(uri)
    fs.create_dir(path, recursive=True)


def delete(uri: str) -> None:
    """Remove a file or a whole folder; nothing happens when it is not there."""
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


def write_atomic(uri: str, write: Callable[[pa.NativeFile], Any]) -> int:
    """Call `write(stream)` and make the result appear under `uri` at once, or not at all. Returns its bytes.

    Raises:
        JobError: the disk is full; the message names the path.
    """
    fs, path = filesystem_of(uri)
    if not isinstance(fs, pafs.LocalFileSystem):
        return _upload(fs, path, write)
    aside = f"{path}{_ASIDE}{uuid.uuid4().hex[:8]}"
    with room_for(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with pa.OSFile(aside, "wb") as stream:
                write(stream)
            with open(aside, "rb+") as written:
                os.fsync(written.fileno())
            size = os.path.getsize(aside)
            os.replace(aside, path)
        finally:
            if os.path.exists(aside):
                os.remove(aside)
    return size


def _upload(fs: pafs.FileSystem, path: str, write: Callable[[pa.NativeFile], Any]) -> int:
    """Write a local file first: closing a stream that has failed half-way would make the half visible."""
    with room_for(tempfile.gettempdir()), tempfile.NamedTemporaryFile() as local:
        with pa.OSFile(local.name, "wb") as stream:
            write(stream)
        size = os.path.getsize(local.name)
        upload_file(fs, path, local)
    return size


def upload_file(fs: pafs.FileSystem, path: str, local: IO[bytes]) -> None:
    """Upload an open local file as one object, in one call: whatever goes wrong before it ends, nothing is visible."""
    size = os.fstat(local.fileno()).st_size
    mapped = mmap.mmap(local.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    with fs.open_output_stream(path) as out:
        out.write(mapped)


@contextmanager
def room_for(where: str) -> Iterator[None]:
    """Turns a disk that is full or read-only (or a quota, or a limit on a file's size) into a JobError that names
    `where`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or _os_error(str(error))
        if number not in _CANNOT_WRITE:
            raise
        raise JobError(
            f"{where}: cannot be written: {os.strerror(number)}; make room (or make it writable) and give the same"
            " command again: what was finished is kept"
        ) from error


def _os_error(said: str) -> int | None:
    """safetensors tells the number of an error in its text alone."""
    found = re.search(r"\(os error (\d+)\)|\[[Ee]rrno (\d+)\]", said)
    return int(found[1] or found[2]) if found else None


def remove_stale(uri: str) -> list[str]:
    """Remove what killed writers have left below the folder `uri`, and beside it under its name; their local paths.

    Only for a folder that nobody writes to at the moment (a run is held by one command). Object stores hold nothing of
    the kind: an upload that was not completed is invisible.
    """
    fs, path = filesystem_of(uri)
    if not isinstance(fs, pafs.LocalFileSystem):
        return []
    folder = Path(path)
    found = list(folder.rglob(f"*{_ASIDE}*")) if folder.is_dir() else []
    found += [p for kind in ("tmp", "old") for p in folder.parent.glob(f".{glob.escape(folder.name)}.{kind}-*")]
    for stale in found:
        delete(str(stale))
    return [str(p) for p in found]


def write_json_atomic(uri: str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    data = (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    write_atomic(uri, lambda stream: stream.write(data))


def read_json(uri: str) -> Any:
    """The JSON value in the file `uri`; UserError when the file is not valid JSON."""
    fs, path = filesystem_of(uri)
    with fs.open_input_stream(path) as stream:
        data = stream.read()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError("not valid JSON", where=uri, found=str(error), fix="delete it and run again") from error


def read_object(uri: str) -> dict[str, Any]:
    """The JSON object in the file `uri`; UserError when the file holds anything else."""
    value = read_json(uri)
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError("not a JSON object", where=uri, found=f"a {kind}", fix="delete it and run again")
    return value


def check_inside(names: Iterable[str], where: str) -> None:
    """Raises UserError for a name that leads out of its folder: names in a manifest, or keys of an object store, may
    have been written by anybody."""
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


def file_signature(uri: str) -> list[int]:
    """Size and time of change of a file; another one when the file is written again.

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
    """(path, size, time of change in ns) of each file. Many files of one folder are looked up by one listing of it:
    ten thousand objects are not ten thousand requests."""
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


def is_whole(uri: str, digest: str) -> bool:
    """True when the file is there and has this SHA-256."""
    return exists(uri) and sha256_of(uri) == digest


@contextmanager
def new_folder(uri: str) -> Iterator[str]:
    """A local folder to fill, which becomes `uri` when the block ends without an error (replacing what was there).

    For a remote `uri` the folder is a temporary one, uploaded at the end; the caller writes its manifest last, by
    `write_json_atomic`, so that readers never take a partial upload for a whole one.
    """
    if is_local(uri):
        with room_for(filesystem_of(uri)[1]):
            yield from _new_local_folder(Path(filesystem_of(uri)[1]))
        return
    with room_for(tempfile.gettempdir()), tempfile.TemporaryDirectory() as folder:
        yield folder
        fs, path = filesystem_of(uri)
        if fs.get_file_info(path).type == pafs.FileType.Directory:
            fs.delete_dir_contents(path)
        pafs.copy_files(folder, path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=fs)


def _new_local_folder(target: Path) -> Iterator[str]:
    """See `new_folder`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}{_ASIDE}", dir=target.parent))
    try:
        yield str(aside)
        aside.chmod(0o755)
        if target.exists():
            old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
            target.rename(old)
            aside.rename(target)
            shutil.rmtree(old)
        else:
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_folder(source: str, target: str) -> None:
    """Copy a folder with all that is in it, between any two places. A copy that is cut short leaves nothing at
    `target`."""
    from_fs, from_path = filesystem_of(source)
    with new_folder(target) as folder:
        pafs.copy_files(from_path, folder, source_filesystem=from_fs, destination_filesystem=pafs.LocalFileSystem())


@contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """A local path with the contents of the folder `uri`: itself when local, else a temporary download."""
    fs, path = filesystem_of(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        yield path
        return
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    check_inside((info.path[len(path.rstrip("/")) + 1 :] for info in infos), uri)
    with tempfile.TemporaryDirectory() as folder:
        pafs.copy_files(path, folder, source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
        yield folder
