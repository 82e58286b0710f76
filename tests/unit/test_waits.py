"""Nothing waits for ever: every call that can wait has a limit, or stands below with the reason why it ends."""

from __future__ import annotations

import ast
import queue
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckd_ray
from ckd_ray.distill import inputs
from ckd_ray.errors import JobError
from ckd_ray.ray_util.waiting import answer

PACKAGE = Path(ckd_ray.__file__).parent

_GROUP = "the process group has the limit of TorchConfig (distill/trainer.py)"
_STREAM = "`execution_no_progress_timeout_s` is set"
# (file, call) -> how many there are, and why they end.
ENDS = {
    ("files/cache.py", "fcntl.flock"): (2, "the kernel frees the lock with its holder; its store limits a download"),
    ("runs/lock.py", "while True"): (1, "tries without waiting, and again only where a holder has just let go"),
    ("ray_util/actor_pool.py", "while True"): (1, "ends after `patience`"),
    ("progress.py", "while True"): (1, "a daemon thread that ends with the progress that it draws"),
    ("jobs/follow.py", "while True"): (2, "follows while the job runs; Ctrl-C, or a cluster lost for 15 min, ends it"),
    ("jobs/remote.py", "while True"): (1, "ends at its deadline"),
    ("ray_util/machines.py", "while True"): (1, "ends after `within`, half an hour at most"),
    ("tracking/trackers.py", "self._calls.get"): (1, "a daemon thread; the run waits a limited time for its end"),
    ("data/lines.py", "while True"): (1, "reads a file to its end"),
    ("cli/look.py", "while True"): (1, "asks a person for the next query"),
    ("cli/look.py", "input"): (1, "asks a person"),
    ("jobs/confirm.py", "sys.stdin.readline"): (1, "asks a person, at a terminal alone"),
    ("serve/service.py", "handle.broadcast"): (1, "its results are asked for with a limit"),
    ("distill/trainer.py", "trainer.fit"): (1, "`_give_up` ends it when no step is finished for hours"),
    ("distill/trainer.py", "while True"): (1, "uses up `max_failures` or `max_bad`, or ends"),
    ("tune/search.py", "tuner.fit"): (1, "ends with its trials, which are trainings (distill/trainer.py)"),
    ("ray_util/parts.py", "dataset.iter_rows"): (1, _STREAM),
    ("ray_util/through_pool.py", "dataset.iter_rows"): (1, _STREAM),
    ("distill/exchange.py", "dist.all_gather"): (1, _GROUP),
    ("distill/exchange.py", "dist.all_reduce"): (1, _GROUP),
    ("distill/step.py", "dist.all_reduce"): (1, _GROUP),
    ("distill/dev.py", "dist.all_gather"): (1, _GROUP),
}

# Calls that wait, and the arguments of which one is a limit.
NEED_LIMIT = {
    "ray.get": ("timeout",),
    "ray.wait": ("timeout",),
    "subprocess.run": ("timeout",),
    "subprocess.call": ("timeout",),
    "subprocess.check_call": ("timeout",),
    "subprocess.check_output": ("timeout",),
    "urllib.request.urlopen": ("timeout",),
    "socket.create_connection": ("timeout",),
}
# Methods that wait for ever without an argument: `queue.get()`, `thread.join()`, `process.wait()`.
NEED_ARGUMENT = {"get", "join", "wait", "result", "communicate", "acquire", "recv", "accept"}
# Calls that have no limit of their own.
NAMED = {"input", "sys.stdin.readline", "fcntl.flock"}
METHODS = {"fit", "iter_rows", "all_gather", "all_reduce", "broadcast", "barrier", "materialize", "take_all"}


def waits(source: str) -> Iterator[tuple[int, str]]:
    """(line, call) of every wait without a limit in a source text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.While) and isinstance(node.test, ast.Constant) and node.test.value:
            yield node.lineno, "while True"
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
        method = name.rpartition(".")[2] if isinstance(node.func, ast.Attribute) else ""
        if name in NEED_LIMIT:
            limited = bool(keywords & set(NEED_LIMIT[name]))
        elif name == "fcntl.flock":
            limited = "LOCK_NB" in ast.unparse(node) or "LOCK_UN" in ast.unparse(node)
        elif name in NAMED or (method in METHODS and not name.startswith(("np.", "torch."))):
            limited = False
        elif method in NEED_ARGUMENT:
            limited = bool(node.args or node.keywords)
        else:
            continue
        if not limited:
            yield node.lineno, name


def test_every_wait_has_a_limit_or_a_reason() -> None:
    found: dict[tuple[str, str], list[int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, call in waits(path.read_text()):
            found.setdefault((path.relative_to(PACKAGE).as_posix(), call), []).append(line)
    new = [
        f"ckd_ray/{file}:{lines}: {call}"
        for (file, call), lines in found.items()
        if len(lines) > ENDS.get((file, call), (0, ""))[0]
    ]
    assert new == [], "give it a limit (ckd_ray/ray_util/waiting.py), or write into ENDS why it ends"
    gone = [key for key, (count, _) in ENDS.items() if len(found.get(key, [])) < count]
    assert gone == [], "no longer in the sources"


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("ray.get(x)", "ray.get"),
        ("ray.wait(x, num_returns=1)", "ray.wait"),
        ("self.ready.get()", "self.ready.get"),
        ("thread.join()", "thread.join"),
        ("process.wait()", "process.wait"),
        ("subprocess.run(['ls'])", "subprocess.run"),
        ("fcntl.flock(f, fcntl.LOCK_EX)", "fcntl.flock"),
        ("while True:\n    time.sleep(1)", "while True"),
    ],
)
def test_a_new_wait_is_noticed(source: str, call: str) -> None:
    assert [name for _, name in waits(source)] == [call]
    assert list(waits("ray.get(x, timeout=1)\nq.get(timeout=1)\n', '.join(x)\nd.get('k')\ne.wait(1)")) == []


def test_a_task_that_cannot_be_placed_is_told(ray_session: None) -> None:
    import ray

    stuck = ray.remote(num_cpus=1000)(lambda: None).remote()
    done = ray.remote(num_cpus=0)(lambda: 7).remote()
    assert answer("the work", [done], 60) == [7]
    with pytest.raises(JobError, match=r"the work: nothing has come within 0\.5 s; the cluster: 1 node with 2 CPU"):
        answer("the work", stuck, 0.5)
    ray.cancel(stuck)


def test_inputs_that_are_never_read_end_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_READ_WITHIN_S", 0.05)
    with pytest.raises(JobError, match="the storage of the run does not answer"):
        inputs._next(queue.Queue())
