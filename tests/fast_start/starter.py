"""A process that has imported the large libraries and forks, so that a worker of Ray starts in a tenth of the time.

More than half of the processor time of the tests with Ray is the import of PyTorch and transformers by some 400 worker
processes, and of Ray, which each of them imports twice. `sitecustomize.py`, in this folder and on the tests'
PYTHONPATH, hands such a process over: it sends its arguments, environment, folder and streams through a socket, and a
fork of this process goes on as that worker, with the code of Ray's worker and a process id of its own.

A process of another environment, interpreter or limit starts in the usual way; so does every process where the
variable is empty, or the system is not Linux.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

VARIABLE = "CKD_TEST_FAST_START"  # the socket
# Not Ray: its job's number and the like are variables that it reads while it is imported.
LIBRARIES = (
    "numpy", "pandas", "pyarrow.dataset", "pyarrow.fs", "torch.distributed", "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert", "faiss",
)  # fmt: skip
# Variables that the libraries read while they are imported; and those of these names that they read later.
_READ_EARLY = ("PYTHON", "OMP_", "GOMP_", "MKL_", "OPENBLAS_", "TORCH", "HF_", "TOKENIZERS_", "LD_", "CUDA_")
_READ_LATER = ("PYTHONPATH", "PYTHONBREAKPOINT", "OMP_NUM_THREADS", "TORCHINDUCTOR_CACHE_DIR")  # Ray gives one thread
_MOST_BYTES = 2**20


def fingerprint(environment: Mapping[str, str]) -> dict[str, Any]:
    """What a fork cannot change any more."""
    early = {k: v for k, v in environment.items() if k.startswith(_READ_EARLY) and k not in _READ_LATER}
    limits = [list(resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))) for name in ("AS", "DATA", "STACK")]
    return {"environment": dict(sorted(early.items())), "limits": limits, "python": sys.executable}


@contextmanager
def running() -> Iterator[dict[str, str]]:
    """A starter, until the block ends; the environment of the processes that shall use it."""
    with TemporaryDirectory() as folder:
        address = str(Path(folder) / "starter")
        own = str(Path(__file__).parent)
        environment = {**os.environ, VARIABLE: address, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen([sys.executable, __file__], env=environment, stdin=subprocess.PIPE)
        try:
            yield {name: environment[name] for name in (VARIABLE, "PYTHONPATH")}
        finally:
            process.kill()
            process.wait()


def parents() -> dict[tuple[int, int], int]:
    """By number and start of a process that was forked here, the number of the Ray node (its raylet) that wanted it."""
    found = {}
    for path in Path(os.environ.get(VARIABLE, "/nowhere")).parent.glob("*.raylet"):
        with suppress(OSError, ValueError):
            started, raylet = map(int, path.read_text().split())
            found[int(path.stem), started] = raylet
    return found


def parent_and_start(pid: int) -> tuple[int, int]:
    """Of a process: the number of its parent, and the ticks from the boot of the machine to its start."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), int(fields[19])


def hand_over(address: str) -> bool:
    """Whether the starter goes on in the place of this process, which has only begun."""
    arguments, variables = _after_set_up(sys.orig_argv[1:])
    request = {
        "fingerprint": fingerprint({**os.environ, **variables}),
        "environment": {**os.environ, **variables},
        "folder": os.getcwd(),
        "path": sys.path,
        "parent": os.getppid(),
        "arguments": arguments,
    }
    if not arguments:
        return False
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
        return connection.recv(2) == b"ok"
    return False


def _after_set_up(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments of a worker, and the variables that Ray's `setup_worker.py` sets for it where it starts it.

    That program imports Ray for that, and then becomes the worker. No arguments where it does more, or starts another.
    """
    if not arguments[0].endswith("/setup_worker.py"):
        return arguments, {}
    options = ("--serialized-runtime-env-context=", "--language=")
    given = {o: a.removeprefix(o) for o in options for a in arguments if a.startswith(o)}
    context = json.loads(given.get(options[0]) or "{}")
    variables = context.pop("env_vars", None) or {}
    ordinary = context.pop("py_executable", sys.executable) in (None, sys.executable) and not any(context.values())
    ordinary &= given.get(options[1]) == "PYTHON" and arguments[1].endswith("/default_worker.py")
    if not ordinary or any("$" in value for value in variables.values()):
        return [], {}
    return [a for a in arguments[1:] if not a.startswith(options)], variables


def main() -> None:
    """Import the libraries, then fork once for each request, until the standard input ends."""
    own = fingerprint(os.environ)
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ[VARIABLE])
    server.listen(128)
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector would write to pages that all forks share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    while True:
        connection, _ = server.accept()
        with connection, suppress(OSError, ValueError):
            message, streams, _, _ = socket.recv_fds(connection, _MOST_BYTES, 3)
            request = json.loads(message)
            if request.pop("fingerprint") != own:
                connection.send(b"no")
            elif child := os.fork():
                record = Path(os.environ[VARIABLE]).parent / f"{child}.raylet"
                record.write_text(f"{parent_and_start(child)[1]} {request['parent']}")
                connection.send(b"ok")
            else:
                server.close()
                connection.close()
                become(request, streams)
            for stream in streams:
                os.close(stream)


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Go on as the process that has sent the request."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        gc.unfreeze()
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.modules["numpy"].random.seed()
        sys.argv = request["arguments"]
        sys.path[:] = [str(Path(sys.argv[0]).parent), *request["path"]]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
