"""A server between us and an S3 server that answers some requests badly: errors, answers cut off, answers cut short."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAYS = ("error", "broken off", "cut short")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that have gone."""


class BadStorage:
    """Passes requests on to `host`:`port`, and answers a share of those for objects badly.

    Ways: `error` (status 500), `broken off` (the connection ends in the middle of the body), `cut short` (half of the
    body as if it were all of it, which a client cannot notice by itself).

    Attributes:
        share: of bad answers, 0 to 1. ways: which of `WAYS`. given: how many bad answers of each way there were.
        refused: uploads of objects with this in their name are always answered with an error.
        delay: seconds before every answer. target: host and port of the server, which may be another one later.

    Args:
        bind: the address to listen at.
    """

    def __init__(self, host: str, port: int, seed: int = 0, bind: str = "127.0.0.1") -> None:
        self.target, self.share, self.ways, self.delay = (host, port), 0.0, WAYS, 0.0
        self.refused: str | None = None
        self.given: Counter[str] = Counter()
        self._rng, self._lock = random.Random(seed), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                try:
                    outer._answer(self)
                except (OSError, http.client.HTTPException, ValueError):  # one of both sides has gone
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = _Server((bind, 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """End the server."""
        self.server.shutdown()
        self.server.server_close()

    def _way(self, method: str) -> str:
        with self._lock:
            if self._rng.random() >= self.share:
                return ""
            way = self._rng.choice(self.ways)
            if way != "error" and method != "GET":
                return ""
            self.given[way] += 1
            return way

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = _body(handler)
        time.sleep(self.delay)
        refuses = self.refused is not None and handler.command == "PUT" and self.refused in handler.path
        way = "error" if refuses else self._way(handler.command)
        if way == "error":
            handler.send_response(500)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        connection = http.client.HTTPConnection(*self.target, timeout=30)
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in ("transfer-encoding", "expect")}
        connection.request(handler.command, handler.path, body, headers | {"Content-Length": str(len(body))})
        found = connection.getresponse()
        data = found.read()
        connection.close()
        handler.send_response(found.status)
        length = found.headers.get("Content-Length", str(len(data))) if handler.command == "HEAD" else str(len(data))
        half = data[: len(data) // 2]
        for name, value in found.headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(half)) if way == "cut short" else length)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(half if way else data)
        if way == "broken off":
            handler.close_connection = True
            handler.connection.close()


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    """The body of a request, which may come in chunks."""
    if "chunked" not in (handler.headers.get("Transfer-Encoding") or ""):
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    parts = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        parts.append(handler.rfile.read(size))
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass
    return b"".join(parts)
