"""Memory of a large batch with cached gradients, against a small plain one; each in a process of its own.

python benchmarks/distill_memory.py RUN BATCH ACCUMULATE      (what the benchmark starts)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import figure, note
from distill_run import DistillRun


def gradcache_memory(run: DistillRun, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Peak resident memory of two steps above what the process held before them: model and opened files."""
    small, large = (4, 32) if args.quick else (32, 256)
    peaks = {}
    for batch, parts in ((small, 1), (large, large // small)):
        command = [sys.executable, __file__, str(run.folder), str(batch), str(parts)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[batch] = json.loads(done.stdout.splitlines()[-1])
        note(f"  batch {batch} in {parts}: {peaks[batch]}")
    settings["memory"] = {
        "plain": {"batch": small, **peaks[small]},
        "cached": {"batch": large, "accumulate": large // small, **peaks[large]},
        "counted": "VmHWM after two steps (with AdamW) less VmRSS before them",
    }
    return {"gradcache_memory_ratio": figure(peaks[large]["peak_mib"] / peaks[small]["peak_mib"], 1.3, "lower")}


def _measure(folder: str, batch: int, parts: int) -> dict[str, float]:
    from distill_run import seconds_a_step

    run = DistillRun(Path(folder))
    task = run.task("collective", batch, accumulate=parts)
    model = run.model()
    before = _status("VmRSS")
    seconds = seconds_a_step(run, task, 1, 1, model)
    return {
        "peak_mib": round((_status("VmHWM") - before) / 1024, 1),
        "before_mib": round(before / 1024, 1),
        "seconds_a_step": round(seconds[0], 3),
    }


def _status(name: str) -> int:
    """KiB, of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
