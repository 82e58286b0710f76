"""What people and programs see: our own lines, and no line of a library."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckd_ray.progress import Progress, duration, say
from ckd_ray.streams import may_colour

NOISY = """
import os, subprocess, sys, warnings
from ckd_ray.errors import JobError, UserError
from ckd_ray.progress import say
from ckd_ray.streams import keep_log, log_path, objects, only_ours
try:
    with only_ours(verbose={verbose}):
        say("ours")
        print("python")
        warnings.warn("a warning", FutureWarning)
        os.write(2, b"C++\\n")
        subprocess.run(["echo", "child"])
        with only_ours():
            print("{{}}", file=objects())
        {end}
except Exception as error:
    say(str(error))
print("log", log_path())
"""


def run(end: str, *, verbose: bool = False, folder: Path) -> subprocess.CompletedProcess[str]:
    code = NOISY.format(end=end, verbose=verbose)
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("end", ["pass", "raise UserError('no')"])
def test_only_our_lines_are_shown(end: str, tmp_path: Path) -> None:
    done = run(end, folder=tmp_path)
    assert done.stdout == "{}\nlog None\n" and list(tmp_path.iterdir()) == []
    assert done.stderr == ("ours\n" if end == "pass" else "ours\nno\n")


def test_a_log_whose_disk_is_full_hides_no_message(tmp_path: Path) -> None:
    """Its last lines could not be written, and the command ended with status 120 and without a word."""
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY)); "
    done = run(full + "print('no room'); print('x' * 9999, file=sys.stderr); raise JobError('broken')", folder=tmp_path)
    assert done.stderr == "ours\nbroken\n" and done.returncode == 0
    (log,) = tmp_path.iterdir()
    assert "child\n" in log.read_text() and "no room" not in log.read_text()


@pytest.mark.parametrize("end", ["raise JobError('broken')", "keep_log()"])
def test_what_others_print_is_in_a_log_of_a_failed_command(end: str, tmp_path: Path) -> None:
    done = run(end, folder=tmp_path)
    (log,) = tmp_path.iterdir()
    assert done.stdout == f"{{}}\nlog {log}\n" and log.stat().st_mode & 0o777 == 0o600
    assert done.stderr == ("ours\nbroken\n" if "raise" in end else "ours\n")
    text = log.read_text()
    for line in ("python\n", "FutureWarning: a warning\n", "C++\n", "child\n"):
        assert line in text


def test_verbose_shows_everything_and_keeps_standard_output_for_programs(tmp_path: Path) -> None:
    done = run("raise JobError('broken')", verbose=True, folder=tmp_path)
    assert done.stdout == "{}\nlog None\n" and list(tmp_path.iterdir()) == []
    for line in ("ours\n", "python\n", "FutureWarning: a warning\n", "C++\n", "child\n", "broken\n"):
        assert line in done.stderr


def test_a_log_gets_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckd_ray.progress._PRINT_EVERY_S", 0.0)
    with Progress("embed"):
        with Progress("embed", 60, "passages", done=20) as progress:
            progress.started -= 10
            progress.advance(10)
            progress.note = "loss 0.5"
            progress.reach(60)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "embed: starting"
    assert second.startswith("embed: 30 of 60 passages (50 %), ") and " left, " in second
    assert third.startswith("embed: 60 of 60 passages (100 %), ") and third.endswith(" passages/s, loss 0.5")


def test_a_terminal_gets_one_line_that_is_rewritten() -> None:
    code = (
        "import time\nfrom ckd_ray.progress import Progress, say\n"
        "with Progress('embed'):\n"
        "    time.sleep(0.7)\n    say('embed: fp32')\n"
        "    with Progress('embed', 4, 'passages') as progress:\n"
        "        progress.advance(1)\n        time.sleep(1.2)\n"
        "say('embed: done')\n"
    )
    outer, inner = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stderr=inner, stdin=inner, stdout=inner)
    os.close(inner)
    shown = b""
    try:
        while piece := os.read(outer, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    text = shown.decode()
    assert text.count("\n") == 2  # the two messages
    assert "\r\x1b[Kembed: working, 0.0 s" in text and "\r\x1b[Kembed: fp32\r\n" in text
    assert "\r\x1b[Kembed: 1 of 4 passages (25 %), " in text and " left, " in text
    assert text.endswith("\r\x1b[Kembed: done\r\n")


def test_a_notebook_gets_one_line_that_is_rewritten_without_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setattr("ckd_ray.progress._NOTEBOOK_EVERY_S", 0.5)
    with Progress("embed", 4, "passages") as progress:
        progress.advance(1)
        time.sleep(0.2)
        say("embed: fp32")
        time.sleep(0.6)
    say("embed: done")
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out and out.count("\n") == 2
    empty = f"\r{' ' * 79}\r"
    assert out.startswith(f"{empty}embed: ") and f"{empty}embed: fp32\n{empty}embed: 1 of 4" in out
    assert out.endswith(f"{empty}embed: done\n")
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))  # imported, no more
    say("in red")
    assert capsys.readouterr() == ("", "in red\n")


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    outer, inner = pty.openpty()
    with open(inner, "w") as terminal, (tmp_path / "file").open("w") as file:
        assert may_colour(terminal) and not may_colour(file)
        monkeypatch.setenv("NO_COLOR", "1")
        assert not may_colour(terminal)
    os.close(outer)


def test_durations() -> None:
    assert [duration(s) for s in (7.26, 245, 7800)] == ["7.3 s", "4 min 05 s", "2 h 10 min"]
