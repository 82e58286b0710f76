"""Peak memory and processor time of this process and all its descendants (Ray's daemons and workers), once a second."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType


class PeakMemory:
    """A context manager. Shared pages (libraries, the object store) are divided among those who map them (PSS).

    Attributes:
        all_gib: peak of the sum over all processes.
        driver_gib: peak resident memory of this process alone, as the kernel saw it.
        processes: most at a time.
    """

    def __init__(self, every: float = 1.0, memory: bool = True) -> None:
        self.all_gib, self.driver_gib, self.processes = 0.0, 0.0, 0
        self._every, self._memory, self._stop = every, memory, threading.Event()
        self._cpu: dict[int, float] = {}
        self._cpu_before = 0.0
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak starts anew
        self._cpu_before = sum(map(_cpu_seconds, _family(os.getpid())))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._note_cpu(_family(os.getpid()))
        self.driver_gib = _field(Path("/proc/self/status"), "VmHWM") / 2**20

    def _sample(self) -> None:
        while not self._stop.wait(self._every):
            family = _family(os.getpid())
            if self._memory:  # walks every page table: a tenth of a core with a dozen processes
                sizes = [_field(Path(f"/proc/{pid}/smaps_rollup"), "Pss") for pid in family]
                self.all_gib = max(self.all_gib, sum(sizes) / 2**20)
            self.processes = max(self.processes, len(family))
            self._note_cpu(family)

    def _note_cpu(self, family: list[int]) -> None:
        self._cpu |= {pid: seconds for pid in family if (seconds := _cpu_seconds(pid))}

    @property
    def cpu_seconds(self) -> float:
        """Since the block began."""
        return sum(self._cpu.values()) - self._cpu_before


def _field(file: Path, name: str) -> int:
    """KiB of a line such as `Pss: 123 kB`; 0 when the process has just ended."""
    try:
        for line in file.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _family(root: int) -> list[int]:
    """`root` and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parent = _field(entry / "status", "PPid")
            children.setdefault(parent, []).append(int(entry.name))
    found, at = [root], 0
    while at < len(found):
        found += children.get(found[at], [])
        at += 1
    return found
