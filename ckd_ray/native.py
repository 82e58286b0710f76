"""The libraries in C that the installation builds where it finds a compiler (`ext-modules` in pyproject.toml).

Each is beside the module that calls it, which computes the same without it. CKD_RAY_NATIVE=0 turns all of them off.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

LONG, POINTER = ctypes.c_long, ctypes.c_void_p
# A thread takes so many queries or more.
_LEAST_A_THREAD = 8


def load_library(module: str, arguments: dict[str, list[Any]]) -> Any:
    """The library `_native` in the folder of the file `module`, or None where there is none that fits.

    Args:
        arguments: the types of the arguments of each function that is called.
    """
    if os.environ.get("CKD_RAY_NATIVE") == "0":
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = Path(module).with_name(f"_native{suffix}")
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                for name, types in arguments.items():
                    getattr(library, name).argtypes = types
            except (OSError, AttributeError):  # built for another machine, or by another version
                continue
            return library
    return None


def in_threads(part: Callable[[int, int], int], count: int, what: str) -> None:
    """Call `part(first, count)` for all queries, split over torch's number of threads. The split changes no result.

    Raises:
        MemoryError: a part has returned something else than 0.
    """
    threads = max(1, min(torch.get_num_threads(), count // _LEAST_A_THREAD))
    bounds = [count * i // threads for i in range(threads + 1)]
    cuts = [(low, high - low) for low, high in pairwise(bounds)]
    if threads == 1:
        codes = [part(*cuts[0])]
    else:
        with ThreadPoolExecutor(threads) as pool:
            codes = list(pool.map(lambda cut: part(*cut), cuts))
    if any(codes):
        raise MemoryError(f"no memory for {what}")
