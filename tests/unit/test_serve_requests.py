"""What a request to the search service may hold, without Ray and without HTTP."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from ckd_ray.errors import UserError
from ckd_ray.serve import job
from ckd_ray.serve.job import ServeOptions, check_can_serve, service_token
from ckd_ray.serve.requests import MOST_BYTES, BadRequestError, SearchRequest, check_token, token_digest


def test_a_sound_request() -> None:
    assert SearchRequest.parse(b'{"query": "hives"}') == SearchRequest("hives", 10)
    assert SearchRequest.parse(b'{"query": " \\u00e9 ", "k": 1000}') == SearchRequest(" é ", 1000)


@pytest.mark.parametrize(
    ("body", "message", "status"),
    [
        (b"", "expected JSON such as", 400),
        (b"\xff\xfe", "expected JSON such as", 400),
        (b"[" * 40_000, "expected JSON such as", 400),
        (b'["hives"]', "expected a JSON object, found list", 400),
        (b"{}", "query: expected a text", 400),
        (b'{"query": "  "}', "query: expected a text", 400),
        (b'{"query": 7}', "query: expected a text", 400),
        (json.dumps({"query": "x" * 10_001}).encode(), "at most 10000 characters, found 10001", 400),
        (b'{"query": "x", "k": 0}', "k: expected a whole number from 1 to 1000, found 0", 400),
        (b'{"query": "x", "k": true}', "found true", 400),
        (b'{"query": "x", "k": 2.5}', "found 2.5", 400),
        (b'{"query": "x", "top": 3}', "unknown key 'top'; expected query, k", 400),
        (b'"' + b"x" * MOST_BYTES + b'"', "expected at most 65536 bytes", 413),
    ],
)
def test_a_bad_request_says_what_is_expected(body: bytes, message: str, status: int) -> None:
    with pytest.raises(BadRequestError) as told:
        SearchRequest.parse(body)
    assert message in str(told.value) and told.value.status == status and len(str(told.value)) < 300


@pytest.mark.parametrize("header", [None, "", "secret", "Bearer", "Bearer wrong", "Basic secret"])
def test_only_the_token_opens(header: str | None) -> None:
    digest = token_digest("secret")
    check_token("Bearer secret", digest)
    check_token("bearer  secret ", digest)
    with pytest.raises(BadRequestError) as told:
        check_token(header, digest)
    assert told.value.status == 401 and "secret" not in str(told.value)


def test_the_token_is_the_user_s_or_made_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(job.TOKEN_VARIABLE, raising=False)
    token, source = service_token()
    assert len(token) == 64 and Path(source).stat().st_mode & 0o777 == 0o600
    assert service_token() == (token, source)
    monkeypatch.setenv(job.TOKEN_VARIABLE, "mine")
    assert service_token() == ("mine", "$CKD_RAY_SERVE_TOKEN")
    monkeypatch.delenv(job.TOKEN_VARIABLE)
    Path(source).write_text("")
    with pytest.raises(UserError, match="the token's file is empty"):
        service_token()


def test_a_taken_port_and_a_missing_extra_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ckd-ray\[serve\]'"):
        check_can_serve(ServeOptions())
    monkeypatch.setattr(job, "find_spec", lambda name: name)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: nothing can listen here"):
            check_can_serve(ServeOptions(port=port))
    check_can_serve(ServeOptions(port=port))
