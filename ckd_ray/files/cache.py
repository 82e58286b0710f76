"""Local copies of remote files, within a bounded space of the disk, shared by the processes of a machine.

Processes agree by locks on files (flock), which end with the process that holds them: one download of a file at a time,
one eviction at a time, and a download whose writer is gone is known for what it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ckd_ray.errors import JobError, UserError
from ckd_ray.files import filesystem_of, room_for

FOLDER_VARIABLE, LIMIT_VARIABLE = "CKD_RAY_CACHE", "CKD_RAY_CACHE_GIB"
_DEFAULT_GIB = 50.0
_ASIDE = ".tmp-"
_LOCKS = ".locks"


class ShardCache:
    """A folder of copies; the least recently used go when it would grow beyond its limit, downloads included.

    Args:
        folder: made when it is missing.
        limit: bytes. One file above it is still fetched, and kept alone.
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
            mine = sum(size for _, size, _ in _copies(Path(folder)))
            half = (shutil.disk_usage(folder).free + mine) / 2 / 2**30
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
            digest: of the contents that are wanted; a file that is written anew under the same URI is fetched anew.

        Raises:
            FileNotFoundError: there is no such file. JobError: the disk is full, or the download came out short.
        """
        path = self._path(uri, digest)
        if _touch(path):
            return str(path)
        with room_for(f"{self.folder} ({FOLDER_VARIABLE})"), self._locked(path.name[:2]):
            if not _touch(path):  # another process has fetched it while this one waited
                self._download(uri, path)
        return str(path)

    def discard(self, uri: str, digest: str) -> None:
        """Drop a copy that has turned out to be damaged."""
        with suppress(FileNotFoundError):
            os.remove(self._path(uri, digest))

    def _path(self, uri: str, digest: str) -> Path:
        return self.folder / hashlib.sha256(f"{uri}\n{digest}".encode()).hexdigest()

    def _download(self, uri: str, path: Path) -> None:
        fs, remote = filesystem_of(uri)
        with fs.open_input_file(remote) as source:
            size = source.size()
            aside = path.with_name(f"{path.name}{_ASIDE}{uuid.uuid4().hex[:8]}")
            try:
                with ExitStack() as stack:
                    with self._locked("room"):
                        self._make_room(size)
                        out = stack.enter_context(open(aside, "xb"))
                        fcntl.flock(out, fcntl.LOCK_EX)
                        out.truncate(size)  # from here on the others count it
                    while block := source.read(1 << 24):
                        out.write(block)
                    if out.tell() != size:
                        raise JobError(f"{uri}: {out.tell()} of {size} bytes came; give the same command again")
                os.replace(aside, path)
            finally:
                with suppress(FileNotFoundError):
                    os.remove(aside)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Alone on this machine; a few hundred lock files at most, however many copies there have been."""
        folder = self.folder / _LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> None:
        """Remove the least recently used until `size` more bytes fit. Maps that are open stay readable."""
        for stale in self.folder.glob(f"*{_ASIDE}*"):
            with suppress(OSError), open(stale, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer is alive
                os.remove(stale)
        entries = list(_copies(self.folder))
        total = sum(s for _, s, _ in entries) + size
        for _, its_size, its_path in sorted(entries):
            if total <= self.limit:
                return
            if _ASIDE in its_path:
                continue
            with suppress(FileNotFoundError):
                os.remove(its_path)
            total -= its_size


def _check_owner(folder: str) -> None:
    """In a temporary folder that all may write to, another user could have made the cache first, and put files into it.

    Raises:
        UserError: the folder is another user's, or others may write to it.
    """
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
    """Marks a copy as used now; False when it is not there."""
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
