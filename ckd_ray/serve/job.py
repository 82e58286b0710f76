"""Start the service, keep it up until it is told to end."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ckd_ray.errors import JobError, UserError, first_line
from ckd_ray.progress import say
from ckd_ray.ray_util.token import ensure_token
from ckd_ray.runs.finished import FinishedRun
from ckd_ray.serve.requests import token_digest
from ckd_ray.serve.service import MOST_WAITING, SearchService

TOKEN_VARIABLE = "CKD_RAY_SERVE_TOKEN"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_START_S = 600.0
_ANSWER_S = 120.0
_NAME = "ckd-ray-search"


@dataclass(frozen=True)
class ServeOptions:
    """Where the service listens, and how many processes answer."""

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1


def check_can_serve(options: ServeOptions) -> None:
    """UserError where Ray Serve is not installed, or the port is taken."""
    if any(find_spec(name) is None for name in ("starlette", "uvicorn", "fastapi")):
        raise UserError("--serve needs Ray's extra `serve`", where="--serve", fix="pip install 'ckd-ray[serve]'")
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            where = f"--host {options.host} --port {options.port}"
            raise UserError("nothing can listen here", where=where, found=str(error), fix="--port N") from None


def service_token() -> tuple[str, str]:
    """(token, where it comes from): CKD_RAY_SERVE_TOKEN, else a file that is made where it is missing."""
    given = os.environ.get(TOKEN_VARIABLE, "").strip()
    if given:
        return given, f"${TOKEN_VARIABLE}"
    path = Path.home() / ".ckd-ray" / "serve_token"
    ensure_token(path)
    token = path.read_text(encoding="utf-8").strip()
    if not token:
        raise UserError("the token's file is empty", where=str(path), fix="delete it, and a new one is made")
    return token, str(path)


@contextmanager
def serving(run: FinishedRun, system: str, options: ServeOptions, token: str) -> Iterator[str]:
    """The service for the length of the block. Ray must be connected. Yields its address.

    Raises:
        UserError: the run has nothing to search with. JobError: the service did not start.
    """
    from ray import serve

    threads = max(1, (os.cpu_count() or 1) // options.replicas)
    deployment: Any = serve.deployment(
        name=_NAME,
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": 0.5},
        max_ongoing_requests=16,
        max_queued_requests=MOST_WAITING,
        max_constructor_retry_count=1,
    )(SearchService)
    listen = {"host": options.host, "port": options.port, "request_timeout_s": _ANSWER_S}
    application = deployment.bind(run.paths.folder, system, token_digest(token), threads)
    try:
        _within(_START_S, lambda: serve.start(proxy_location="HeadOnly", http_options=listen))
        _within(_START_S, lambda: serve.run(application, name=_NAME, route_prefix="/"))
        host = f"[{options.host}]" if ":" in options.host else options.host
        yield f"http://{host}:{options.port}"
    finally:
        serve.shutdown()


def serve_until_told(run: FinishedRun, system: str, options: ServeOptions, terminate: Callable[..., None]) -> None:
    """Serve until Ctrl-C or SIGTERM, which is how a service ends.

    Args:
        terminate: the handler of SIGTERM; Ray puts one in place that ends the process at once.
    """
    from ckd_ray.ray_util.session import connected

    token, source = service_token()
    # Ray Serve gives its proxy 5 s to load Python on a busy machine, three times, and then gives up.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
    if options.host not in _LOOPBACK:
        say(f"{options.host} is no loopback address: the token and the queries travel unencrypted in this network")
    with connected("local"):
        signal.signal(signal.SIGTERM, terminate)
        say("starting the service")
        with serving(run, system, options, token) as address:
            say(f"{run.name}: POST {address}/search, with the token of {source}; Ctrl-C ends the service", always=True)
            with suppress(KeyboardInterrupt):
                while not threading.Event().wait(60.0):
                    pass
            say("the service ends")


def _within(seconds: float, work: Callable[[], Any]) -> None:
    """Run `work` in a thread, as Ray Serve waits for a replica without a limit."""
    raised: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise JobError(f"the service did not start: {first_line(raised[0])}") from raised[0]
    if thread.is_alive():
        raise JobError(f"the service did not start within {seconds:.0f} s")
