"""An SSH tunnel to the dashboard of a head, which is opened again after it breaks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from ckd_ray.errors import JobError
from ckd_ray.ray_util.sockets import answers

DASHBOARD_PORT = 8265
_OPEN_WITHIN_S = 30.0


class Tunnel:
    """`ssh -N -L` in a process group of its own, which Ctrl-C at the terminal does not reach; a context manager.

    Args:
        ssh: the ssh command with its options and the host, as the launcher calls it.
    """

    def __init__(self, ssh: Sequence[str]) -> None:
        self._local = _free_port()  # a new connection keeps the address
        self.address = f"http://127.0.0.1:{self._local}"
        forward = f"127.0.0.1:{self._local}:127.0.0.1:{DASHBOARD_PORT}"
        self._command = [ssh[0], "-N", "-T", "-o", "BatchMode=yes", "-L", forward, *ssh[1:]]
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this object)

    def __enter__(self) -> Tunnel:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.close()

    def ensure(self) -> None:
        """Open the tunnel if it is not open.

        Raises:
            ConnectionError: ssh cannot connect now.
            JobError: there is no ssh on this machine.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._errors.seek(0)
        self._errors.truncate()
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise JobError("ssh, which connects to clusters, is not installed on this machine") from error
        deadline = time.monotonic() + _OPEN_WITHIN_S
        while not answers(self._local):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise ConnectionError(f"ssh: {self._last_error()}")
            time.sleep(0.1)

    def close(self) -> None:
        """End ssh."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(3)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(3)
            self._process = None

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        lines = [line for line in lines if "Permanently added" not in line]
        return lines[-1].strip() if lines else "no connection"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
