"""Watches for a stage that stands still. Ray notices a process that ends, and none that is stopped or waits for ever.

Where no unit of work is finished, this looks at the processes of the job on every node. When neither they nor the
command have used their processor for as long as the limit says, those that hold work are ended, and Ray repeats their
work. If that does not help, the command ends with a message. Whatever computes is left alone: it has the limits of
waiting.py.

Ray 2.60 may lose a task: a request to a machine that leaves at that moment is never sent to another one (issue 63405
of ray-project/ray). Then all machines are free, nothing waits for one, and the stage stands still; the command ends
after minutes.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from ckd_ray.errors import described
from ckd_ray.progress import duration, say, standing
from ckd_ray.ray_util import watch
from ckd_ray.ray_util.again import same_command
from ckd_ray.ray_util.machines import alive

# A process, and the command itself, does not compute if it uses less than this share of a core. A waiting process still
# answers requests of Ray, and the command still manages the tasks of a stage.
_IDLE, _IDLE_COMMAND = 0.02, 0.2
# Without a process that holds work there is nothing to end, and the command may wait for machines, or for storage: as
# long as for a unit of work (4 hours by default).
_ALONE = 8
# A stage that has stood still for so long, with Ray at rest for as long again, waits for a task that Ray has lost.
_AT_REST_S = 120.0
_ANSWER_S = 60.0
_NAMED = 8
# Titles of processes that work: tasks are functions, and these are the actors. Others are servants of Ray.
_WORKS = re.compile(r"ray::(MapBatches|MapWorker|ShardServer|RayTrainWorker|_?[a-z])")


@dataclass(frozen=True)
class Worker:
    """A process that holds work, on a node of Ray, and when it was started (ticks since the boot)."""

    node: str
    host: str
    pid: int
    started: int
    title: str = field(compare=False)  # it changes with the work

    def __str__(self) -> str:
        return f"{self.title} (process {self.pid} on {self.host})"


@contextmanager
def moving(limit: float) -> Iterator[None]:
    """Watch the stages of the block. Ray is connected.

    Args:
        limit: seconds.
    """
    look = _Look(limit, threading.current_thread() is threading.main_thread())
    threading.Thread(target=look.follow, name="stage-watch", daemon=True).start()
    try:
        yield
    finally:
        look.over.set()


class _Look:
    """The thread of a watch.

    Attributes:
        over: the block has ended.
    """

    def __init__(self, limit: float, in_main: bool) -> None:
        self.over = threading.Event()
        self._limit, self._in_main = limit, in_main
        self._ended: float | None = None  # when processes were ended; None again when work is finished after that
        self._first: tuple[float, float, dict[Worker, float]] | None = None  # time, processor time of command, workers
        self._at_rest: tuple[float, float] | None = None  # since when, processor time of command

    def follow(self) -> None:
        """Look until the block ends, or the command has to."""
        while not self.over.wait(min(10.0, self._limit / 20)):
            try:
                self._look(time.monotonic())
            except Exception as error:  # a node does not answer, or Ray is closing: watch.py judges that
                self._first = None
                print(f"ckd-ray: the watch over stages could not look: {described(error)}", file=sys.stderr)

    def _look(self, now: float) -> None:
        at = standing()
        stage, still = at or ("", 0.0)
        self._look_for_lost_task(stage, still, now)
        if self._ended is not None and now - still > self._ended:
            self._ended = None
        if self._ended is not None:
            still = now - self._ended
        if still < self._limit / 2:
            self._first = None
        elif self._first is None:
            self._first = now, time.process_time(), _at_work()
        elif now - self._first[0] >= self._limit / 2:
            since, command, before = self._first
            self._first = now, time.process_time(), _at_work()
            window, workers = now - since, self._first[2]
            computes = any(u == math.inf or u - before.get(w, -window) >= _IDLE * window for w, u in workers.items())
            if not computes and self._first[1] - command < _IDLE_COMMAND * window:
                self._act(stage, still, list(workers))

    def _look_for_lost_task(self, stage: str, still: float, now: float) -> None:
        if not self._in_main or still < _AT_REST_S or not _ray_is_at_rest():
            self._at_rest = None
            return
        since, command = self._at_rest = self._at_rest or (now, time.process_time())
        idle = time.process_time() - command < _IDLE_COMMAND * (now - since)
        if now - since >= _AT_REST_S and idle and not _at_work():
            self._end(
                f"{stage}: nothing has been finished for {duration(still)}. A machine has left, the others are free,"
                f" and no task waits for one: Ray has lost a task. Give {same_command()} again: what was finished is"
                " kept"
            )

    def _act(self, stage: str, still: float, workers: list[Worker]) -> None:
        """Nothing computes: end the workers, or the command where that has not helped."""
        what = f"{stage}: nothing has been finished for {duration(still)}, and no process computes"
        if workers and (self._ended is None or not self._in_main):
            say(f"{what}; ended, so that their work is done again: {_named(workers)}", always=True)
            _at_work(workers)
            self._ended, self._first = time.monotonic(), None
        elif self._in_main and (workers or still >= _ALONE * self._limit):
            who = f", after processes were ended once. It waits for {_named(workers)}" if workers else ""
            self._end(
                f"{what}{who}. See whether these machines and the storage of the run answer, or raise"
                f" run.stuck_after_minutes; then give {same_command()} again: what was finished is kept"
            )

    def _end(self, why: str) -> None:
        """End the command: by an error in its main thread, or, where that does not get on, at once."""
        watch.end(why)
        if not self.over.wait(watch.PATIENCE_S):
            os._exit(1)


def _ray_is_at_rest() -> bool:
    """Whether a machine has left the cluster, all CPUs and GPUs of the others are free, and nothing waits for them."""
    from ray._private import worker
    from ray.core.generated import autoscaler_pb2

    messages: Any = autoscaler_pb2  # made by protoc, without types
    this: Any = worker._global_node
    reply = messages.GetClusterResourceStateReply()
    reply.ParseFromString(this.get_gcs_client().get_cluster_resource_state(timeout_s=_ANSWER_S))
    state = reply.cluster_resource_state
    here = [node for node in state.node_states if node.status != messages.NodeStatus.DEAD]
    busy = any(
        node.available_resources.get(name, 0.0) < node.total_resources.get(name, 0.0)
        for node in here
        for name in ("CPU", "GPU")
    )
    waits = state.pending_resource_requests or state.pending_gang_resource_requests
    return len(here) < len(state.node_states) and not busy and not waits


def _named(workers: list[Worker]) -> str:
    more = f" and {len(workers) - _NAMED} more" if len(workers) > _NAMED else ""
    return ", ".join(str(worker) for worker in workers[:_NAMED]) + more


def _at_work(end: Sequence[Worker] = ()) -> dict[Worker, float]:
    """The processes of this job that hold work, on all nodes, and the seconds of a processor that each has used.

    Args:
        end: these are killed before.

    Raises:
        TimeoutError: a node does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    calls: dict[str, list[Any]] = {}
    for node in [node["NodeID"] for node in alive()]:
        task = ray.remote(num_cpus=0, max_retries=0)(_processes)
        here = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        there = [(worker.pid, worker.started) for worker in end if worker.node == node]
        calls[node] = [here.remote(there) for _ in range(2)]  # Ray may give a task to a process that is stopped
    found: dict[Worker, float] = {}
    for node, both in calls.items():
        done, _ = ray.wait(both, num_returns=1, timeout=_ANSWER_S)
        if not done:
            raise TimeoutError(f"node {node} has not answered within {_ANSWER_S:.0f} s")
        for host, pid, started, title, used in ray.get(done[0], timeout=_ANSWER_S):
            found[Worker(node, host, pid, started, title)] = used
    return found


def _processes(end: Sequence[tuple[int, int]]) -> list[tuple[str, int, int, str, float]]:
    """On a node: (host, pid, start, title, processor seconds) of the processes of this job that hold work. The seconds
    are infinite for one that is on a processor or waits for one.

    The logs of Ray's workers lie in the folder of their session, and begin with the job. Only Linux tells of them.
    """
    import ray

    log, job = os.readlink("/proc/self/fd/1"), f":job_id:{ray.get_runtime_context().get_job_id()}\n"
    host, logs, found = ray.util.get_node_ip_address(), os.path.join(os.path.dirname(log), "worker-"), []
    if not log.startswith(logs):  # a pipe or a terminal, and so those of others: reading them would take what they hold
        return []
    for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()]:
        with suppress(OSError, IndexError):  # it has ended, or is another user's
            if pid == os.getpid() or not os.readlink(f"/proc/{pid}/fd/1").startswith(logs):
                continue
            if job not in _read(pid, "fd/1") or _processes.__name__ in (title := _read(pid, "cmdline").strip(" \0")):
                continue
            state, *fields = _fields(pid, "stat")
            started, used = int(fields[18]), (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")
            waits = any(_fields(pid, f"task/{thread}/stat")[0] == "R" for thread in os.listdir(f"/proc/{pid}/task"))
            if (pid, started) in end:
                os.kill(pid, signal.SIGKILL)
            elif state in ("T", "t") or _WORKS.match(title):
                found.append((host, pid, started, title, math.inf if waits else used))
    return found


def _fields(pid: int, name: str) -> list[str]:
    """Of a `stat`, from the state on."""
    return _read(pid, name).rpartition(")")[2].split()


def _read(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/{name}", errors="replace") as file:
        return file.read(1000)
