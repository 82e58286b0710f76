"""A run is held by one command: the second is told by whom, and what a dead one has left is taken over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckd_ray.errors import UserError
from ckd_ray.runs import lock
from ckd_ray.runs.lock import run_lock

HOLD = (
    "import sys, time\nfrom ckd_ray.runs.lock import run_lock\n"
    "with run_lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(600)\n"
)


def hold(run: Path, *prefix: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([*prefix, sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = hold(tmp_path / "run")
    yield process
    process.kill()
    process.wait()


def test_the_second_command_is_told_who_holds_the_run(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    told = rf"another ckd-ray works in this run\n  found: process {holder.pid} on {socket.gethostname()} since \d{{4}}-"
    with pytest.raises(UserError, match=told), run_lock(str(tmp_path / "run")):
        pass
    os.kill(holder.pid, signal.SIGSTOP)  # stopped is not dead
    with pytest.raises(UserError, match=told), run_lock(str(tmp_path / "run")):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()
    with run_lock(str(tmp_path / "run")):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_number_that_another_process_has_now_does_not_count(tmp_path: Path) -> None:
    """Process numbers are used again: the lock of a dead process names one that lives, ours."""
    leave(tmp_path, host=socket.gethostname(), pid=os.getpid())
    with run_lock(str(tmp_path)):
        pass


def leave(run: Path, **values: object) -> None:
    (run / ".lock").write_text(json.dumps({"since": "2026-01-01 00:00:00", "kernel": "another", **values}))


def test_across_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can ask whether a process elsewhere lives; it writes its lock anew, and after three minutes without that
    it is gone, whatever the clocks of the machines say."""
    leave(tmp_path, host="elsewhere", pid=7)
    with pytest.raises(UserError, match=r"process 7 on elsewhere since 2026-01-01.*\n.*delete .*/\.lock"):
        with run_lock(str(tmp_path)):
            pass
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    past = (tmp_path / ".lock").stat().st_mtime - 181
    os.utime(tmp_path / ".lock", (past, past))
    with run_lock(str(tmp_path)):
        assert json.loads((tmp_path / ".lock").read_text())["host"] == socket.gethostname()
    # A container that was started again has another name and the same kernel: its lock went with it.
    leave(tmp_path, host="an-earlier-container", pid=1, kernel=lock._kernel())
    with run_lock(str(tmp_path)):
        pass


def test_a_process_of_this_machine_can_be_asked_for(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Where there is no flock, on an object store: by number and start, so that a number used again does not count."""
    theirs = json.loads((tmp_path / "run" / ".lock").read_text())
    me = theirs | {"pid": os.getpid(), "started": lock._started(os.getpid())}
    assert not lock._is_dead(theirs, me)
    assert lock._is_dead(theirs | {"started": "1"}, me)
    holder.kill()
    while lock._started(holder.pid) is not None:  # until it is a zombie
        pass
    assert lock._is_dead(theirs, me)
    for key in ("kernel", "pids"):  # of another machine or container it cannot be said
        assert not lock._is_dead(theirs | {key: "another"}, me)
        assert not lock._is_dead(theirs, me | {key: ""})


def test_a_holder_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_HEARTBEAT_S", 0.05)
    with run_lock(str(tmp_path)):
        os.utime(tmp_path / ".lock", (1, 1))
        for _ in range(100):
            if (tmp_path / ".lock").stat().st_mtime > 1:
                break
            __import__("time").sleep(0.05)
        assert lock._age(str(tmp_path / ".lock")) < 60


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 5}'])
def test_a_lock_that_says_nothing_holds_nothing(tmp_path: Path, content: str) -> None:
    """Its process died between making the file and writing into it."""
    (tmp_path / ".lock").write_text(content)
    if content == '{"host": 5}':
        with pytest.raises(UserError, match="process None on 5"), run_lock(str(tmp_path)):
            pass
        return
    with run_lock(str(tmp_path)):
        pass


def test_many_that_come_at_once_hold_it_one_after_the_other(tmp_path: Path) -> None:
    """Over the lock of a dead process, three start together: never two at a time hold the run."""
    code = (
        "import os, sys, time\nfrom ckd_ray.errors import UserError\nfrom ckd_ray.runs.lock import run_lock\n"
        "run, got = sys.argv[1], 0\nend = time.time() + 2\n"
        "while time.time() < end:\n"
        "    try:\n"
        "        with run_lock(run):\n"
        "            os.mkdir(run + '/inside'); time.sleep(0.001); os.rmdir(run + '/inside'); got += 1\n"
        "    except UserError:\n"
        "        time.sleep(0.001)\n"
        "print(got)\n"
    )
    leave(tmp_path, host=socket.gethostname(), pid=2**22 + 1)
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    all_ = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    done = [process.communicate(timeout=120) for process in all_]
    assert [process.returncode for process in all_] == [0] * 3, done
    assert sum(int(out) for out, _ in done) > 3


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="the run directory cannot be written"),
        run_lock(str(tmp_path / "file" / "run")),
    ):
        pass
