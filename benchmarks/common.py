"""What the benchmarks share: the command line, the machine's description, and the one JSON object they print.

A figure is a ratio (or a size) measured in one run, with its goal and the direction that is better. People's output
goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from ckd_ray.ray_util.session import use_token

use_token()


def arguments(description: str, **extra: Any) -> argparse.Namespace:
    """`--quick` (at most 5 minutes on two cores: smaller sizes, the same method), `--data DIR` (a collection in the
    MS MARCO layout; the documentation of installed packages when it is left out) and `--only NAME` (may be repeated).

    Args:
        extra: further options by name, with the keyword arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, the same method, within 5 minutes")
    parser.add_argument("--data", metavar="DIR", help="collection.tsv, queries.SPLIT.tsv, qrels.SPLIT.tsv")
    parser.add_argument("--only", action="append", metavar="NAME", help="measure this part alone (may be repeated)")
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    args = parser.parse_args()
    sys.stdout = sys.stderr  # Ray prints warnings of its daemons to standard output, which is for the object alone
    return args


def figure(value: float | None, goal: float | None, better: Literal["higher", "lower"]) -> dict[str, Any]:
    """One measured number. `goal` is None where the number is only stated; `value` is None where it was left out."""
    return {"value": None if value is None else float(f"{value:.5g}"), "goal": goal, "better": better}


def machine() -> dict[str, Any]:
    """Where this was measured, and what else ran at the same time (load: runnable processes over 1 and 5 minutes)."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpu": gpu,
        "load": [round(x, 2) for x in os.getloadavg()[:2]],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The model's name, and the instruction sets that decide how fast it multiplies."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = dict(line.rstrip("\n").split(":", 1) for line in file if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    values = {key.strip(): value.strip() for key, value in lines.items()}
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    found = [flag for flag in known if flag in values.get("flags", "").split()]
    return f"{values.get('model name', platform.machine())} ({', '.join(found)})"


def emit(settings: dict[str, Any], figures: dict[str, dict[str, Any]], before: dict[str, Any]) -> None:
    """Print the object. `before` is `machine()` taken when the benchmark began, so that its load is not our own."""
    print(json.dumps({"machine": before, "settings": settings, "figures": figures}), file=sys.__stdout__, flush=True)


def note(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def alternate(first: Callable[[], Any], second: Callable[[], Any], rounds: int = 3) -> tuple[float, float]:
    """Seconds of both, in turn A B A B, the best of each: what else the machine does falls on both alike."""
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for i, call in enumerate((first, second)):
            started = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - started)
    return best[0], best[1]
