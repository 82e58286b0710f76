"""The HTTP service: Ray Serve routes requests to replicas of `SearchService`, each of which holds the student."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ckd_ray.errors import first_line
from ckd_ray.serve.model import LiveSearcher
from ckd_ray.serve.requests import MOST_BYTES, BadRequestError, SearchRequest, check_token

# Requests that wait for a replica; further ones are answered with 503 at once.
MOST_WAITING = 1024
# Less than a request may take (`serve/job.py`), so that the answer names the cause.
_RELOAD_S = 110.0
_ROUTES = {"/search": "POST", "/reload": "POST", "/health": "GET"}


class SearchService:
    """One replica. It answers one search at a time, with all of its threads; what comes meanwhile waits.

    Args:
        run, system: see `LiveSearcher`.
        digest: of the token (`requests.token_digest`).
        threads: of torch.
    """

    def __init__(self, run: str, system: str, digest: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._digest = digest
        self._live = LiveSearcher(run, system)
        self._live.watch()
        self._one = ThreadPoolExecutor(1, thread_name_prefix="search")  # a tokenizer serves one thread

    async def __call__(self, request: Any) -> Any:
        """Answer a starlette Request with a JSONResponse."""
        from starlette.responses import JSONResponse

        try:
            return JSONResponse(await self._answer(request))
        except BadRequestError as error:
            allow = {"Allow": _ROUTES[request.url.path]} if error.status == 405 else None
            return JSONResponse({"error": str(error)}, error.status, allow)
        except Exception as error:  # whatever storage and libraries raise: the cause in a line, for this request alone
            return JSONResponse({"error": f"{type(error).__name__}: {first_line(error)}"}, 500)

    async def _answer(self, request: Any) -> dict[str, Any]:
        check_token(request.headers.get("authorization"), self._digest)
        path = request.url.path
        if path not in _ROUTES:
            raise BadRequestError(f"no such path; expected {', '.join(f'{m} {p}' for p, m in _ROUTES.items())}", 404)
        if request.method != _ROUTES[path]:
            raise BadRequestError(f"expected {_ROUTES[path]} {path}, found {request.method}", 405)
        if path == "/health":
            return self._live.state()
        if path == "/reload":
            replicas = await self._reload_all()
            replaced = any(one.get("replaced") for one in replicas)
            return {"replaced": replaced, **self._live.state(), "replicas": replicas}
        asked = SearchRequest.parse(await _body(request))
        return await asyncio.get_running_loop().run_in_executor(self._one, self._search, asked)

    async def reload(self) -> dict[str, Any]:
        """Look for another student, in this replica. `waits_for` says why there is none."""
        replaced = await asyncio.to_thread(self._live.look)
        state = self._live.state()
        return {"replaced": replaced, "model": state["model"], "waits_for": state["waits_for"]}

    async def _reload_all(self) -> list[dict[str, Any]]:
        """`reload` in all replicas; an entry with `error` for each that did not answer.

        Ray Serve 2.55 reaches no replica but the one that it picks, so there the list has this one alone.

        Raises:
            TimeoutError: a replica takes longer than `_RELOAD_S`.
        """
        from ray import serve

        mine = serve.get_replica_context()
        handle = serve.get_deployment_handle(mine.deployment, mine.app_name)
        if not hasattr(type(handle), "broadcast"):
            return [await self.reload()]
        found = await handle.broadcast("reload").results_async(timeout_s=_RELOAD_S, return_exceptions=True)
        return [
            {"error": f"{type(one).__name__}: {first_line(one)}"} if isinstance(one, BaseException) else one
            for one in found
        ]

    def _search(self, asked: SearchRequest) -> dict[str, Any]:
        identity, searcher = self._live.answering
        hits = [hit.to_dict() for hit in searcher.search(asked.query, asked.k)]
        return {"query": asked.query, "model": identity, "hits": hits}


async def _body(request: Any) -> bytes:
    """The body; reading ends with the piece that exceeds what is allowed."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            break
    return b"".join(parts)
