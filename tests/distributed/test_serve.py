"""The search service, through HTTP, on a kept run: its answers, its refusals, and another student while it answers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ckd_ray.runs.finished import open_finished
from ckd_ray.search.searcher import Searcher
from ckd_ray.serve.job import ServeOptions, serving
from tests.fault.processes import below

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
KEPT = Path(__file__).parents[1] / "data" / "run-0.1.zip"
TOKEN = "of the test"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with zipfile.ZipFile(KEPT) as archive:
        archive.extractall(tmp_path)
    return tmp_path / "kept"


@pytest.fixture
def address(run: Path, ray_session: None) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ServeOptions(port=port, replicas=2)
    with serving(open_finished(str(run)), "student", options, TOKEN) as found:
        yield found


def ask(url: str, body: bytes | None = None, token: str = TOKEN, method: str | None = None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def models(address: str) -> set[str]:
    """Those that the replicas answer with; each of eight questions goes to one of them."""
    return {ask(f"{address}/health")[1]["model"] for _ in range(8)}


def replace_student(run: Path, store: Path, model: Path) -> None:
    """As a training ends: the new student with its embeddings appears under the names of the former one."""
    for new, name in ((store, "student_embeddings"), (model, "student")):
        shutil.copytree(new, run / f"{name}.new")
        os.rename(run / name, run / f"{name}.old")
        os.rename(run / f"{name}.new", run / name)
        shutil.rmtree(run / f"{name}.old")


def test_answers_refusals_and_another_student(run: Path, address: str) -> None:
    query = (run.parent / "collection" / "queries.test.tsv").read_text().splitlines()[0].split("\t")[1]
    asked = json.dumps({"query": query, "k": 4}).encode()
    former = [shutil.copytree(run / name, run.parent / name) for name in ("student_embeddings", "student")]
    expected = {
        s: [h.to_dict() for h in Searcher(open_finished(str(run)), s).search(query, 4)] for s in ("student", "teacher")
    }
    status, found = ask(f"{address}/search", asked)
    assert status == 200 and found["hits"] == expected["student"] != expected["teacher"]
    status, health = ask(f"{address}/health")
    assert status == 200 and health["passages"] == 12 and health["model"] == found["model"]

    assert ask(f"{address}/search", asked, token="another")[0] == 401
    assert ask(f"{address}/search", b'{"query": ""}') == (400, {"error": "query: expected a text that is not empty"})
    assert ask(f"{address}/search")[0] == 405 and ask(f"{address}/nothing")[0] == 404
    assert ask(f"{address}/search", b"x" * (1 << 20))[0] == 413

    answers: list[tuple[int, Any]] = []
    ended = threading.Event()

    def client() -> None:
        while not ended.wait(0.01):
            answers.append(ask(f"{address}/search", asked))

    clients = [threading.Thread(target=client) for _ in range(3)]
    for thread in clients:
        thread.start()
    try:
        replace_student(run, run / "embeddings", run / "teacher")
        status, reloaded = ask(f"{address}/reload", b"")
        assert status == 200 and reloaded["model"] != found["model"] and reloaded["waits_for"] is None
        both = [(one["model"], one["waits_for"]) for one in reloaded["replicas"]]
        assert both == [(reloaded["model"], None)] * 2, "one request reloads both replicas"
        assert models(address) == {reloaded["model"]}
        replace_student(run, *former)  # and without a request: every replica looks by itself
        deadline = time.monotonic() + 60
        while models(address) != {found["model"]} and time.monotonic() < deadline:
            time.sleep(0.2)
        assert models(address) == {found["model"]}, "the student that came without a request"
        time.sleep(1)
    finally:
        ended.set()
        for thread in clients:
            thread.join(60)
    assert {status for status, _ in answers} == {200}, "a request was dropped"
    by_model = {found["model"]: expected["student"], reloaded["model"]: expected["teacher"]}
    assert {answer["model"] for _, answer in answers} == by_model.keys()
    assert all(answer["hits"] == by_model[answer["model"]] for _, answer in answers)


@pytest.mark.soak
def test_a_replica_that_is_stopped_is_replaced(address: str) -> None:
    """By Ray Serve. Meanwhile the other replica answers, and a request to the stopped one has a limit."""
    stopped, *others = [process.pid for process in below(os.getpid()) if "ServeReplica" in process.title]
    assert len(others) == 1
    os.kill(stopped, signal.SIGSTOP)
    asked, statuses, started = json.dumps({"query": "a", "k": 1}).encode(), [], time.monotonic()
    try:
        while statuses[-6:] != [200] * 6 or any(process.pid == stopped for process in below(os.getpid())):
            assert time.monotonic() - started < 600, statuses
            try:
                statuses.append(ask(f"{address}/search", asked)[0])
            except OSError:  # no answer within the minute of `ask`
                statuses.append(0)
    finally:
        with suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    print(f"{time.monotonic() - started:.0f} s, {statuses}")
