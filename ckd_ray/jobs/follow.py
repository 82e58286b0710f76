"""Follow a job as if it ran here: its lines, its object and its exit status, through lost connections and Ctrl-C."""

from __future__ import annotations

import asyncio
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO

from ckd_ray.errors import JobError, UserError
from ckd_ray.jobs.submit import BEGIN, MARK, Jobs
from ckd_ray.progress import duration, say
from ckd_ray.streams import people

_POLL_S = 2.0
_LONGEST_PAUSE_S = 20.0
_GIVE_UP_AFTER_S = 900.0


@dataclass(frozen=True)
class Outcome:
    """`status` is the exit status of this process; `detached` says that the job may still run."""

    status: int
    detached: bool = False


class Printer:
    """Prints a job's log, which comes in pieces: lines for people to standard error, the object of `--json` to
    `objects`. `taken` counts the characters, for a log that is read again from its beginning."""

    def __init__(self, objects: TextIO | None) -> None:
        self._objects = objects
        self._rest = ""
        self._begun = False
        self._before: list[str] = []
        self.taken = 0

    def take(self, text: str) -> None:
        """The next piece, of any length."""
        self.taken += len(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)

    def end(self) -> None:
        """The log is complete. If the job never began, print what Ray wrote."""
        if self._rest:
            self._line(self._rest)
            self._rest = ""
        if not self._begun:
            for line in self._before:
                print(line, file=people(), flush=True)

    def _line(self, line: str) -> None:
        if not self._begun:
            self._begun = line == BEGIN
            self._before += [] if self._begun else [line]
        elif line.startswith(MARK):
            if self._objects is not None:
                print(line.removeprefix(MARK), file=self._objects, flush=True)
        else:
            print(line, file=people(), flush=True)


class _Tail(threading.Thread):
    """Reads a job's log from its beginning and puts the pieces into a queue; None at the end."""

    def __init__(self, client: Any, job: str) -> None:
        super().__init__(daemon=True)
        self._client, self._job = client, job
        self.pieces: queue.Queue[str | None] = queue.Queue()
        self.start()

    def run(self) -> None:
        with suppress(Exception):  # of any kind when the connection breaks; the follower finds the reason
            asyncio.run(self._read())
        self.pieces.put(None)

    async def _read(self) -> None:
        async for piece in self._client.tail_job_logs(self._job):
            self.pieces.put(piece)


class Interrupts:
    """Counts Ctrl-C and SIGTERM, which then do not interrupt what is going on; the fourth one does."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, signum: int, frame: Any) -> None:
        self.count += 1
        if self.count > 3:
            raise KeyboardInterrupt

    @classmethod
    @contextmanager
    def counted(cls) -> Iterator[Interrupts]:
        """For the length of the block."""
        mine = cls()
        before = {number: signal.signal(number, mine) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield mine
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def follow(jobs: Jobs, job: str, reattach: str, objects: TextIO | None) -> Outcome:
    """Print the job's log until the job has ended or the user leaves.

    The first Ctrl-C asks the job to stop and waits for that; the second one leaves the job alone.

    Args:
        reattach: the command that follows this job again.
        objects: where the object of `--json` goes.

    Raises:
        JobError: the cluster cannot be reached any more.
    """
    with Interrupts.counted() as interrupts:
        return _Follower(jobs, job, reattach, Printer(objects), interrupts).run()


class _Follower:
    def __init__(self, jobs: Jobs, job: str, reattach: str, printer: Printer, interrupts: Interrupts) -> None:
        self.jobs, self.job, self.reattach, self.printer, self.interrupts = jobs, job, reattach, printer, interrupts
        self.asked_to_stop = False
        self.lost_since: float | None = None
        self.pause = 1.0

    def run(self) -> Outcome:
        while True:
            try:
                outcome = self._while_connected()
                if outcome is not None:
                    return outcome
            except ConnectionError as error:
                self._lost(str(error))
                if self._wait(self.pause):
                    return self._detached()
                self.pause = min(2 * self.pause, _LONGEST_PAUSE_S)

    def _while_connected(self) -> Outcome | None:
        """Follow over one connection. None when the stream of the log has ended before the job."""
        client = self.jobs.client()
        info = self._info()
        self._connected_again()
        if info.status.is_terminal():
            return self._ended(info)
        tail, skip, asked = _Tail(client, self.job), self.printer.taken, time.monotonic()
        while True:
            if self._stop_wanted() == "detach":
                return self._detached()
            piece: str | None = ""
            with suppress(queue.Empty):
                piece = tail.pieces.get(timeout=0.3)
            if piece is None:
                self._wait(1.0)
                return None
            if piece:
                new = piece[skip:]
                skip = max(0, skip - len(piece))
                self.printer.take(new)
            if time.monotonic() - asked >= _POLL_S:
                info, asked = self._info(), time.monotonic()
                if info.status.is_terminal():
                    return self._ended(info)

    def _info(self) -> Any:
        try:
            return self.jobs.info(self.job)
        except UserError as error:
            raise JobError(
                f"the cluster does not know job {self.job} any more: its head has restarted; run the same command again"
                " without --fresh or --from, and finished work in run.storage is kept"
            ) from error

    def _stop_wanted(self) -> str | None:
        if self.interrupts.count >= 2:
            return "detach"
        if self.interrupts.count == 1 and not self.asked_to_stop:
            say("stopping the job; Ctrl-C again leaves it alone")
            self.jobs.stop(self.job)
            self.asked_to_stop = True
        return None

    def _wait(self, seconds: float) -> bool:
        """Wait. True as soon as the user wants to leave."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.interrupts.count < 2:
            time.sleep(0.1)
        return self.interrupts.count >= 2

    def _lost(self, reason: str) -> None:
        now = time.monotonic()
        if self.lost_since is None:
            self.lost_since = now
        if now - self.lost_since > _GIVE_UP_AFTER_S:
            raise JobError(
                f"the cluster has been out of reach for {duration(now - self.lost_since)} ({reason}); the job may still"
                f" run: {self.reattach}"
            )
        say(f"lost the connection to the cluster ({reason}); trying again in {self.pause:.0f} s")

    def _connected_again(self) -> None:
        if self.lost_since is not None:
            say(f"connected again after {duration(time.monotonic() - self.lost_since)}")
        self.lost_since, self.pause = None, 1.0

    def _ended(self, info: Any) -> Outcome:
        self.printer.take(self.jobs.log(self.job)[self.printer.taken :])
        self.printer.end()
        status = info.status.value
        if status == "STOPPED":
            say(f"job {self.job} was stopped")
            return Outcome(130)
        if status == "SUCCEEDED":
            return Outcome(0)
        if info.driver_exit_code is None or info.driver_exit_code < 0:
            say(f"the job failed: {(info.message or 'no reason given').strip()[:2000]}")
        code = info.driver_exit_code
        return Outcome(code if code is not None and code > 0 else 1)

    def _detached(self) -> Outcome:
        state = "has been asked to stop" if self.asked_to_stop else "goes on"
        say(f"left job {self.job}, which {state}; follow it again with\n  {self.reattach}")
        return Outcome(130, detached=True)
