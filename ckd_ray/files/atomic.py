"""Atomic writes: a half-written file never stands under its final name.

A local file is written under a temporary name, flushed to the disk and renamed. An object store shows an upload only
when it is complete. `remove_stale` deletes what a killed writer has left; every stage calls it before it starts
(runs/artifact.py).
"""

from __future__ import annotations

import errno
import glob
import mmap
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
from safetensors import SafetensorError

from ckd_ray.errors import JobError
from ckd_ray.files.paths import check_inside, delete, filesystem_of, is_local

# Stands in the name of everything that is still being written.
_ASIDE = ".tmp-"


_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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
