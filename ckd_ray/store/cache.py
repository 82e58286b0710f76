"""Local copies of remote shards, within a bounded space of the disk, shared by the processes of a machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from ckd_ray.errors import UserError
from ckd_ray.store.files import filesystem_of

FOLDER_VARIABLE, LIMIT_VARIABLE = "CKD_RAY_CACHE", "CKD_RAY_CACHE_GIB"
_DEFAULT_GIB = 50.0


class ShardCache:
    """A folder of copies; the least recently used go when it grows beyond its limit.

    Args:
        folder: made when it is missing.
        limit: bytes. One file above it is still fetched, and kept alone.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit

    @classmethod
    def of_this_machine(cls) -> ShardCache:
        """The folder that CKD_RAY_CACHE names (else one in the temporary folder), of CKD_RAY_CACHE_GIB GiB (else 50, or
        half of what the disk has free)."""
        folder = os.environ.get(FOLDER_VARIABLE) or os.path.join(tempfile.gettempdir(), f"ckd-ray-cache-{os.getuid()}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        given = os.environ.get(LIMIT_VARIABLE)
        try:
            gib = float(given) if given else min(_DEFAULT_GIB, shutil.disk_usage(folder).free / 2 / 2**30)
        except ValueError:
            gib = 0.0
        if not gib > 0:
            raise UserError("not a size", where=LIMIT_VARIABLE, expected="GiB, above 0", found=str(given))
        return cls(folder, int(gib * 2**30))

    def fetch(self, uri: str, digest: str) -> str:
        """The path of a local copy of the file `uri`, downloaded unless it is there.

        Args:
            digest: of the contents that are wanted; a file that is written anew under the same URI is fetched anew.
        """
        name = hashlib.sha256(f"{uri}\n{digest}".encode()).hexdigest()
        path = self.folder / name
        try:
            os.utime(path)
            return str(path)
        except FileNotFoundError:
            pass
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f"{name}.tmp-{uuid.uuid4().hex[:8]}"
        fs, remote = filesystem_of(uri)
        try:
            with fs.open_input_stream(remote) as source, open(aside, "wb") as out:
                while block := source.read(1 << 24):
                    out.write(block)
            self._make_room(aside.stat().st_size)
            os.replace(aside, path)
        finally:
            with suppress(FileNotFoundError):
                os.remove(aside)
        return str(path)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used until `size` more bytes fit. Maps that are open stay readable."""
        entries = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if ".tmp-" not in entry.name:
                    entries.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        total = sum(s for _, s, _ in entries) + size
        for _, its_size, its_path in sorted(entries):
            if total <= self.limit:
                return
            with suppress(FileNotFoundError):
                os.remove(its_path)
            total -= its_size
