"""Looking for a Ray that does not answer."""

from __future__ import annotations

import socket

import pytest

from ckd_ray.errors import UserError
from ckd_ray.ray_util import session


def test_a_head_that_is_stopped_is_given_up_with_its_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "_ANSWER_S", 2.0)
    monkeypatch.setattr(session, "_TRY_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel takes connections, nobody reads them
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match="this Ray does not answer") as caught:
            session._reach(address, "this machine's Ray")
    told = capsys.readouterr()
    assert caught.value.found == address and "--cluster local" in (caught.value.fix or "")
    assert (told.out + told.err).count(f"the Ray at {address} does not answer; waiting") == 1


def test_nothing_that_listens_is_an_error_of_the_system() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(OSError):
        session._reach(f"127.0.0.1:{port}", "RAY_ADDRESS")
