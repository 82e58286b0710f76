"""The watch over stages: whom it ends, and when. tests/fault/test_watchdog.py does the same with real processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from ckd_ray.progress import Progress, standing
from ckd_ray.ray_util import stuck
from ckd_ray.ray_util.stuck import Worker, _Look

LIMIT = 1000.0
ONE, OTHER = (Worker("n", "10.0.0.7", pid, 1, "ray::MapBatches(_label_part)") for pid in (1, 2))


class World:
    """Processes and a clock. `used` says how many seconds of a processor each has used by a time."""

    def __init__(self, look: _Look) -> None:
        self.look, self.now, self.moved, self.command = look, 0.0, 0.0, 0.0
        self.at_rest = False
        self.used: Callable[[float], dict[Worker, float]] = lambda now: {}
        self.ended: list[Worker] = []
        self.told: list[str] = []

    def pass_time(self, seconds: float, every: float = 10.0) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += every
            self.look._look(self.now)


@pytest.fixture()
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    look = _Look(LIMIT, True)
    look.over.set()  # so that nobody waits for the end of the command
    found = World(look)

    def at_work(end: Sequence[Worker] = ()) -> dict[Worker, float]:
        found.ended += end
        return found.used(found.now)

    monkeypatch.setattr(stuck, "_at_work", at_work)
    monkeypatch.setattr(stuck, "_ray_is_at_rest", lambda: found.at_rest)
    monkeypatch.setattr(stuck, "standing", lambda: ("label", found.now - found.moved))
    monkeypatch.setattr("time.monotonic", lambda: found.now)
    monkeypatch.setattr("time.process_time", lambda: found.command * found.now)
    monkeypatch.setattr(stuck.watch, "end", found.told.append)
    return found


def test_what_waits_is_ended_once_and_then_the_command(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.used = lambda now: {ONE: 7.0 + 0.01 * now, OTHER: 1.0}
    world.pass_time(0.9 * LIMIT)
    assert world.ended == []
    world.pass_time(0.2 * LIMIT)
    assert world.ended == [ONE, OTHER] and world.told == []
    said = capsys.readouterr().err
    assert said.startswith("label: nothing has been finished for 16 min 40 s, and no process computes; ended, so")
    assert "ray::MapBatches(_label_part) (process 1 on 10.0.0.7), ray::" in said
    world.pass_time(1.1 * LIMIT)
    assert world.ended == [ONE, OTHER] and len(world.told) == 1
    for part in ("label: ", "were ended once", "process 1 on 10.0.0.7", "run.stuck_after_minutes", "the same command"):
        assert part in world.told[0]


def test_work_that_is_finished_after_it_begins_the_count_anew(world: World) -> None:
    world.used = lambda now: {ONE: 7.0}
    world.pass_time(1.1 * LIMIT)
    world.moved = world.now
    world.pass_time(1.1 * LIMIT)
    assert world.ended == [ONE, ONE] and world.told == []


@pytest.mark.parametrize(
    "used",
    [
        lambda now: {ONE: 7.0, OTHER: 0.03 * now},
        lambda now: {ONE: 7.0, OTHER: math.inf},
        lambda now: {ONE: 7.0, Worker("n", "h", int(now), 1, "ray::MapBatches(_label_part)"): 0.1},
    ],
    ids=["computes a little", "waits for a processor", "has just been started"],
)
def test_nothing_is_ended_while_a_process_works(world: World, used: Callable[[float], dict[Worker, float]]) -> None:
    world.used = used
    world.pass_time(20 * LIMIT)
    assert world.ended == world.told == []


def test_nothing_is_ended_while_the_command_computes(world: World) -> None:
    world.used, world.command = lambda now: {ONE: 7.0}, 0.5
    world.pass_time(20 * LIMIT)
    assert world.ended == world.told == []


def test_nothing_is_ended_while_work_is_finished(world: World) -> None:
    world.used = lambda now: {ONE: 7.0}
    for _ in range(30):
        world.pass_time(0.7 * LIMIT)
        world.moved = world.now
    assert world.ended == world.told == []


def test_a_command_that_waits_alone_has_as_long_as_a_unit_of_work(world: World) -> None:
    world.pass_time(7.9 * LIMIT)
    assert world.told == []
    world.pass_time(0.7 * LIMIT)
    assert world.told and "the storage of the run" in world.told[0] and "were ended" not in world.told[0]


def test_a_task_that_ray_has_lost_ends_the_command_after_minutes(world: World) -> None:
    world.at_rest = True
    world.pass_time(230.0)
    assert world.told == []
    world.pass_time(30.0)
    assert world.told and "label: nothing has been finished for 4 min" in world.told[0]
    assert "Ray has lost a task. Give the same command again" in world.told[0]


def test_no_task_is_lost_while_anything_works(world: World) -> None:
    world.pass_time(600.0)  # Ray has work, or work waits for machines
    world.at_rest, world.used = True, lambda now: {ONE: 7.0}  # a task that reserves nothing
    world.pass_time(300.0)
    world.used, world.command, world.moved = lambda now: {}, 0.5, world.now
    world.pass_time(600.0)
    world.command, world.moved = 0.0, world.now
    for _ in range(10):
        world.pass_time(200.0)
        world.moved = world.now
    assert world.told == []


def test_another_thread_than_the_main_one_is_not_interrupted(world: World) -> None:
    world.look._in_main, world.used = False, lambda now: {ONE: 7.0}
    world.pass_time(3.5 * LIMIT)
    assert len(world.ended) == 3 and world.told == []


def test_progress_tells_for_how_long_nothing_was_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    assert standing() is None
    with Progress("label"), Progress("label: parts", 10, "queries") as progress:
        now[0] += 50
        progress.reach(0)  # the same as before
        assert standing() == ("label: parts", 50.0)
        progress.advance(1)
        assert standing() == ("label: parts", 0.0)
    assert standing() is None
