"""Atomic writes: a file under its final name is always complete.

A local file is written under a temporary name, flushed to the disk and renamed. An object store shows an upload only
when it is complete. `remove_stale` deletes what a killed writer has left; every stage calls it before it starts.

Folders go to and come from object storage file by file, and their sizes are compared: `pyarrow.fs.copy_files` tells
nothing of an upload that has failed (PyArrow 26).
"""

from __future__ import annotations

import errno
import glob
import mmap
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
from safetensors import SafetensorError

from ckd_ray.errors import JobError
from ckd_ray.files.paths import check_inside, delete, file_sizes, filesystem_of, is_local, join

# In the name of every file and folder that is being written.
TEMPORARY = ".tmp-"
# Files of a folder that are on their way at once, and bytes that are read at a time.
_AT_ONCE, _BLOCK = 8, 8 << 20
_TRIES = 3
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def write_atomic(uri: str, write: Callable[[pa.NativeFile], Any]) -> int:
    """Call `write(stream)` and make the result appear under `uri` at once, or not at all. Returns its bytes.

    Raises:
        JobError: the disk is full; the message names the path.
    """
    fs, path = filesystem_of(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        with room_for(path), replace_atomically(path) as temporary:
            with pa.OSFile(temporary, "wb") as stream:
                write(stream)
            return os.path.getsize(temporary)
    # A local file first: closing an upload that has failed would make the part that was written visible.
    with room_for(tempfile.gettempdir()), tempfile.NamedTemporaryFile() as local:
        with pa.OSFile(local.name, "wb") as stream:
            write(stream)
        upload_file(fs, path, local)
        return os.path.getsize(local.name)


@contextmanager
def replace_atomically(path: str) -> Iterator[str]:
    """A temporary local path; its file is flushed to the disk and renamed to `path` when the block ends without an
    error."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}{TEMPORARY}{uuid.uuid4().hex[:8]}"
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def upload_file(fs: pafs.FileSystem, path: str, local: IO[bytes]) -> None:
    """Upload an open local file as one object, in one call, so that nothing is visible unless the call succeeds."""
    size = os.fstat(local.fileno()).st_size
    mapped = mmap.mmap(local.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    with fs.open_output_stream(path) as out:
        out.write(mapped)


def upload_folder(folder: str, uri: str) -> None:
    """Upload all files of a local folder to the remote folder `uri`.

    Raises:
        OSError: one could not be uploaded, or the storage lacks one afterwards.
    """
    fs, path = filesystem_of(uri)
    wanted = file_sizes(folder)

    def upload(name: str) -> None:
        with Path(folder, name).open("rb") as local:
            upload_file(fs, f"{path}/{name}", local)

    _each(upload, wanted)
    stored = file_sizes(uri)
    if lacks := [name for name, size in wanted.items() if stored.get(name) != size]:
        raise OSError(f"{path}: the storage has not kept {', '.join(lacks)}")


@contextmanager
def room_for(where: str) -> Iterator[None]:
    """Turns the error of a full or read-only disk, a quota or a limit on file sizes into a JobError that names
    `where`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors tells the number of an error in its text alone.
        found = re.search(r"\(os error (\d+)\)|\[[Ee]rrno (\d+)\]", str(error))
        number = getattr(error, "errno", None) or (int(found[1] or found[2]) if found else None)
        if number not in _CANNOT_WRITE:
            raise
        raise JobError(
            f"{where}: cannot be written: {os.strerror(number)}; make room (or make it writable) and give the same"
            " command again: what was finished is kept"
        ) from error


def remove_stale(uri: str) -> list[str]:
    """Remove what killed writers have left in the folder `uri` and, under its name, next to it; their local paths.

    Only for a folder that nobody writes to at the time (one command holds a run). Object stores show no incomplete
    uploads.
    """
    fs, path = filesystem_of(uri)
    if not isinstance(fs, pafs.LocalFileSystem):
        return []
    folder = Path(path)
    found = list(folder.rglob(f"*{TEMPORARY}*")) if folder.is_dir() else []
    found += [p for kind in ("tmp", "old") for p in folder.parent.glob(f".{glob.escape(folder.name)}.{kind}-*")]
    for stale in found:
        delete(str(stale))
    return [str(p) for p in found]


@contextmanager
def new_folder(uri: str) -> Iterator[str]:
    """A local folder to fill, which replaces `uri` when the block ends without an error.

    For a remote `uri` the folder is uploaded at the end. The caller writes its manifest last, by `write_json_atomic`,
    so that readers see no partial upload as a complete one.
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
        upload_folder(folder, uri)


def _new_local_folder(target: Path) -> Iterator[str]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
    try:
        yield str(temporary)
        # safetensors makes files that only their owner can read; the umask decides, as for every other file.
        ordinary = temporary.stat().st_mode & 0o666
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(ordinary)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        if old.exists():
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_folder(source: str, target: str) -> None:
    """Copy a folder between any two places. A copy that is interrupted leaves nothing at `target`."""
    with new_folder(target) as folder:
        if is_local(source):
            shutil.copytree(filesystem_of(source)[1], folder, dirs_exist_ok=True)
        else:
            _download_folder(source, folder)


@contextmanager
def local_copy(uri: str, without: tuple[str, ...] = ()) -> Iterator[str]:
    """A local path with the contents of the folder `uri`: itself when local, else a temporary download.

    Args:
        without: endings of the files that a download leaves out.
    """
    fs, path = filesystem_of(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        _download_folder(uri, folder, without)
        yield folder


def _download_folder(uri: str, folder: str, without: tuple[str, ...] = ()) -> None:
    """`local_copy` of a remote folder, into a local one."""
    fs, path = filesystem_of(uri)
    sizes = {n: size for n, size in file_sizes(uri, missing_ok=False).items() if not n.endswith(without)}
    check_inside(sizes, uri)

    def download(name: str) -> None:
        target = Path(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with fs.open_input_stream(f"{path}/{name}") as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, _BLOCK)
        if (given := target.stat().st_size) != sizes[name]:
            raise OSError(f"{join(uri, name)}: the storage gives {given:,} of its {sizes[name]:,} bytes")

    with room_for(folder):
        _each(download, sizes)


def _each(call: Callable[[str], None], names: Iterable[str]) -> None:
    """Make the call for every name, several at once; make one again that raises OSError, some times."""

    def patient(name: str) -> None:
        for tries_left in reversed(range(_TRIES)):
            try:
                return call(name)
            except OSError as error:
                if not tries_left or error.errno in _CANNOT_WRITE:
                    raise
                time.sleep(1)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(patient, names):
            pass  # raises what a call has raised
