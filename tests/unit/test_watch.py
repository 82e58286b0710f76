"""The watch over Ray's daemon: it judges while the block lasts, and not while Ray is being closed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType, SimpleNamespace

import pytest

from ckd_ray.errors import JobError, LostRayError, UserError
from ckd_ray.ray_util import watch


@pytest.fixture()
def caught(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    found: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        found.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    monkeypatch.setattr(watch, "_LOOK_S", 0.01)
    yield found
    signal.signal(signal.SIGTERM, before)


def test_a_daemon_that_ends_while_ray_is_closed_was_told_to(caught: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []
    monkeypatch.setattr(watch, "_ended_daemon", lambda: gone[0] if gone else None)

    def close() -> None:
        gone.append("ended")
        time.sleep(0.1)

    with watch.watched(close):
        time.sleep(0.05)
    assert caught == [] and watch.lost() is None


def test_one_that_ends_before_is_told(
    caught: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "_ended_daemon", lambda: "the raylet has ended")
    closed: list[bool] = []
    with watch.watched(lambda: closed.append(True)):
        deadline = time.monotonic() + 10
        while not caught and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caught == [signal.SIGTERM] and closed == [True]
    assert (watch.lost() or "").startswith("the raylet has ended; give the same command again")
    assert capsys.readouterr().err == f"ckd-ray: {watch.lost()}\n", (
        "said once, before anything else can end the process"
    )


def test_an_input_whose_reading_the_loss_has_interrupted_is_no_mistake(
    caught: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that loads an encoder takes the interruption for one that cannot be loaded."""
    monkeypatch.setattr(watch, "_ended_daemon", lambda: "the raylet has ended")
    with pytest.raises(LostRayError, match="the raylet has ended"), watch.watched(lambda: None):
        deadline = time.monotonic() + 10
        while not caught and time.monotonic() < deadline:
            time.sleep(0.01)
        raise UserError("the encoder cannot be loaded")


def test_an_error_that_comes_of_the_loss_is_told_as_the_loss(
    caught: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's own error may be first, and says something of an actor."""
    monkeypatch.setattr(watch, "_LOOK_S", 60.0)
    monkeypatch.setattr(watch, "_ended_daemon", lambda: "the raylet has ended")
    with pytest.raises(LostRayError, match="the raylet has ended; give the same command again"):
        with watch.watched(lambda: None):
            raise JobError("an actor is unavailable")
    assert capsys.readouterr().err == f"ckd-ray: {watch.lost()}\n" and caught == []
    with pytest.raises(UserError, match="a mistake"), watch.watched(lambda: None):
        raise UserError("a mistake")
    monkeypatch.setattr(watch, "_ended_daemon", lambda: None)
    with pytest.raises(JobError, match="the disk is full"), watch.watched(lambda: None):
        raise JobError("the disk is full")


def joined(monkeypatch: pytest.MonkeyPatch, socket: str, head: str) -> None:
    node = SimpleNamespace(raylet_socket_name=socket, gcs_address=head, all_processes={})
    monkeypatch.setattr("ray._private.worker._global_node", node)
    monkeypatch.setattr(watch, "_dead_node", lambda: None)


def wait_for(caught: list[int]) -> None:
    deadline = time.monotonic() + 20
    while not caught and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_raylet_of_a_ray_that_was_joined(caught: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is nobody's child here, and the head takes half a minute to declare its node dead. Ray ends the process before
    that, without a word."""
    joined(monkeypatch, "/there/raylet.7", "auto")
    stands_in = ["there/raylet", "-c", "import time; time.sleep(60)", "--raylet_socket_name=/there/raylet.7"]
    with subprocess.Popen(stands_in, executable=sys.executable) as raylet:
        while not watch._is_raylet(raylet.pid, "/there/raylet.7"):
            time.sleep(0.01)
        with watch.watched(lambda: None):
            time.sleep(0.2)
            assert caught == []
            raylet.kill()
            wait_for(caught)
    assert caught == [signal.SIGTERM] and "(raylet) has ended" in (watch.lost() or "")


def test_a_head_that_does_not_answer(caught: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    joined(monkeypatch, "/nowhere", "127.0.0.1:1")
    monkeypatch.setattr(watch, "_ASK_S", 0.01)
    with watch.watched(lambda: None):
        time.sleep(0.3)
        assert caught == []
    monkeypatch.setattr(watch, "_SILENCE_S", 0.05)
    with watch.watched(lambda: None):
        wait_for(caught)
    assert caught == [signal.SIGTERM] and (watch.lost() or "").startswith("Ray's head at 127.0.0.1:1 has not answered")


def test_whatever_an_interrupted_library_raises_is_the_loss(
    caught: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "_ended_daemon", lambda: "the raylet has ended")
    with pytest.raises(LostRayError, match="the raylet has ended"), watch.watched(lambda: None):
        deadline = time.monotonic() + 10
        while not caught and time.monotonic() < deadline:
            time.sleep(0.01)
        raise SystemError("returned a result with an exception set")
    monkeypatch.setattr(watch, "_ended_daemon", lambda: None)
    with pytest.raises(SystemError), watch.watched(lambda: None):
        raise SystemError("of its own")
