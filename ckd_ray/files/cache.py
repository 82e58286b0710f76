"""Local copies of remote files in a bounded space of the disk, shared by the processes of a machine.

Processes agree by locks on files (flock), which end with the process that holds them: one download of a file at a time,
one eviction at a time, and an unfinished download without a lock has lost its writer.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ckd_ray.errors import JobError, UserError
from ckd_ray.files import filesystem_of, is_local, last_part, room_for
from ckd_ray.files.atomic import TEMPORARY

FOLDER_VARIABLE, LIMIT_VARIABLE = "CKD_RAY_CACHE", "CKD_RAY_CACHE_GIB"
_DEFAULT_GIB = 50.0
_LOCKS = ".locks"


class ShardCache:
    """A folder of copies. The least recently used are removed when it would exceed its limit, downloads included.

    Args:
        folder: created when it is missing.
        limit: bytes. A larger file is still fetched, and is then the only copy.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit

    @classmethod
    def of_this_machine(cls) -> ShardCache:
        """The folder that CKD_RAY_CACHE names (else one in the temporary folder), of CKD_RAY_CACHE_GIB GiB (else 50, or
        half of what the disk has for it)."""
        folder = os.environ.get(FOLDER_VARIABLE) or os.path.join(tempfile.gettempdir(), f"ckd-ray-cache-{os.getuid()}")
        given = os.environ.get(LIMIT_VARIABLE)
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            _check_owner(folder)
            used = sum(size for _, size, _ in _copies(Path(folder)))
            half = (shutil.disk_usage(folder).free + used) / 2 / 2**30
            gib = float(given) if given else min(_DEFAULT_GIB, half)
        except UserError:
            raise
        except ValueError:
            gib = 0.0
        except OSError as error:
            raise UserError(
                "the cache of remote files cannot be made",
                where=folder,
                found=str(error),
                fix=f"set {FOLDER_VARIABLE} to a folder that can be written",
            ) from error
        if not gib > 0:
            raise UserError("not a size", where=LIMIT_VARIABLE, expected="GiB, above 0", found=str(given))
        return cls(folder, int(gib * 2**30))

    def fetch(self, uri: str, digest: str) -> str:
        """The path of a local copy of the file `uri`, downloaded unless it is there.

        Args:
            digest: of the contents; a file with other contents under the same URI is downloaded again.

        Raises:
            FileNotFoundError: there is no such file. JobError: the disk is full, or the download is incomplete.
        """
        path = self._path(uri, digest)
        if _touch(path):
            return str(path)
        with room_for(f"{self.folder} ({FOLDER_VARIABLE})"), self._locked(path.name[:2]):
            if not _touch(path):  # another process may have downloaded it while this one waited
                self._download(uri, path)
        return str(path)

    def discard(self, uri: str, digest: str) -> None:
        """Remove a damaged copy."""
        with suppress(FileNotFoundError):
            os.remove(self._path(uri, digest))

    def _path(self, uri: str, digest: str) -> Path:
        return self.folder / hashlib.sha256(f"{uri}\n{digest}".encode()).hexdigest()

    def _download(self, uri: str, path: Path) -> None:
        fs, remote = filesystem_of(uri)
        with fs.open_input_file(remote) as source:
            size = source.size()
            temporary = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
            try:
                with ExitStack() as stack:
                    with self._locked("room"):
                        self._make_room(size)
                        out = stack.enter_context(open(temporary, "xb"))
                        fcntl.flock(out, fcntl.LOCK_EX)
                        out.truncate(size)  # other processes count it from here on
                    while block := source.read(1 << 24):
                        out.write(block)
                    if out.tell() != size:
                        raise JobError(f"{uri}: {out.tell()} of {size} bytes came; give the same command again")
                os.replace(temporary, path)
            finally:
                with suppress(FileNotFoundError):
                    os.remove(temporary)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Holds a lock of this machine; there are a few hundred lock files at most, whatever the number of copies."""
        folder = self.folder / _LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> None:
        """Remove the least recently used copies until `size` more bytes fit. Open maps stay readable."""
        for stale in self.folder.glob(f"*{TEMPORARY}*"):
            with suppress(OSError), open(stale, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer is alive
                os.remove(stale)
        copies = sorted(_copies(self.folder))
        total = sum(copy_size for _, copy_size, _ in copies) + size
        for _, copy_size, path in copies:
            if total <= self.limit:
                return
            if TEMPORARY not in path:
                with suppress(FileNotFoundError):
                    os.remove(path)
                total -= copy_size


class Copies:
    """Which files of a folder are read as copies in this machine's cache: those that `files` names, if the folder is
    remote and they take no more than half of the cache. Larger ones would push one another out.

    Args:
        files: name, bytes and sha256 of each, as a manifest has them.
    """

    def __init__(self, folder: str, files: Sequence[Mapping[str, Any]]) -> None:
        self._cache: ShardCache | None = None
        if files and not is_local(folder):
            cache = ShardCache.of_this_machine()
            if sum(int(file["bytes"]) for file in files) <= cache.limit // 2:
                self._cache = cache
        self._digests = {last_part(file["name"]): str(file.get("sha256", file["bytes"])) for file in files}

    def here(self, uri: str) -> str:
        """The file to open in place of `uri`."""
        digest = self._digests.get(last_part(uri))
        return uri if self._cache is None or digest is None else self._cache.fetch(uri, digest)

    def discard(self, uri: str) -> bool:
        """Remove the copy of `uri`; False where there is none."""
        digest = self._digests.get(last_part(uri))
        if self._cache is None or digest is None:
            return False
        self._cache.discard(uri, digest)
        return True


def _check_owner(folder: str) -> None:
    """Raises UserError when the folder is another user's, or others may write to it: they could put files into it."""
    info = os.stat(folder)
    if info.st_uid not in (os.getuid(), 0) or info.st_mode & 0o022:
        raise UserError(
            "others can write to the cache of remote files",
            where=folder,
            expected="a folder of yours with mode 0700",
            found=f"user {info.st_uid}, mode {info.st_mode & 0o7777:04o}",
            fix=f"chmod 700 it, or set {FOLDER_VARIABLE} to another folder",
        )


def _touch(path: Path) -> bool:
    """Marks a copy as used now; False when there is none."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _copies(folder: Path) -> Iterator[tuple[float, int, str]]:
    """(time of last use, bytes, path) of every copy, unfinished ones too."""
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            if entry.is_file():
                info = entry.stat()
                yield info.st_mtime, info.st_size, entry.path
