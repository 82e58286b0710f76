"""A moto S3 server in a process of its own that can be killed: its objects are also files, and come back from these.

`python -m tests.fault.s3_server FOLDER PORT` serves until it is killed. What is lost then is what may be lost: requests
that were not answered, and uploads that were not completed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ACCOUNT = "123456789012"
Wsgi = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Durable:
    """Requests one at a time through moto; what one has changed is on the disk before its answer goes out."""

    def __init__(self, app: Wsgi, folder: Path) -> None:
        self.app, self.folder, self.lock = app, folder, threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self.lock:
            answer = list(self.app(environ, start_response))
            if environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE"):
                self._keep()
        return answer

    def _keep(self) -> None:
        """Make the folder hold what the server holds: the objects of a test are few."""
        wanted: dict[Path, Any] = {}
        for bucket in _backend().buckets.values():
            (self.folder / bucket.name).mkdir(parents=True, exist_ok=True)
            for name, key in bucket.keys.items():
                wanted[self.folder / bucket.name / urllib.parse.quote(name, safe="")] = key
        for path, key in wanted.items():
            written = key.last_modified.replace(tzinfo=timezone.utc).timestamp()
            if path.exists() and path.stat().st_mtime == written and path.stat().st_size == key.size:
                continue
            aside = self.folder / f".{uuid.uuid4().hex}"
            aside.write_bytes(key.value)
            os.utime(aside, (written, written))
            aside.replace(path)
        for path in self.folder.glob("*/*"):
            if path not in wanted:
                path.unlink()


def _backend() -> Any:
    from moto.s3.models import s3_backends

    return s3_backends[ACCOUNT]["aws"]


def restore(folder: Path) -> None:
    """Give moto the objects of the folder, with the times at which they were written."""
    for bucket in (p for p in folder.iterdir() if p.is_dir()):
        _backend().create_bucket(bucket.name, "us-east-1")
        for path in bucket.iterdir():
            key = _backend().put_object(bucket.name, urllib.parse.unquote(path.name), path.read_bytes())
            key.last_modified = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).replace(tzinfo=None)


class Server:
    """A server of our own on a port that stays the same. `start` goes on with the objects that were there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[str] | None = None

    @property
    def uri(self) -> str:
        """A folder in a bucket."""
        options = f"scheme=http&endpoint_override=127.0.0.1:{self.port}&allow_bucket_creation=true"
        return f"s3://key:secret@ckd-ray/runs?{options}"

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "tests.fault.s3_server", str(self.folder), str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None and self._process.stdout.readline().startswith("ready")

    def kill(self) -> None:
        """As if its machine had lost its power."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def objects(self) -> dict[str, float]:
        """Times of change, by name within the bucket; also while no server runs."""
        files = (self.folder / "ckd-ray").glob("*")
        return {urllib.parse.unquote(p.name): p.stat().st_mtime for p in files}


def main() -> None:
    """Serve until killed; `ready` on standard output says that the port is open."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    restore(folder)
    app = Durable(DomainDispatcherApplication(create_backend_app), folder)
    server = make_server("127.0.0.1", port, app, threaded=True, request_handler=MotoRequestHandler)
    print(f"ready {server.port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
