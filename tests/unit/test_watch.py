"""The watch over Ray's daemon: it judges while the block lasts, and not while Ray is being closed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from ckd_ray.errors import LostRayError
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
