"""ckd-ray: distil collective relevance labels into a late-interaction (ColBERT) retriever, on Ray.

import ckd_ray

run = ckd_ray.train("config.yaml", **{"distill.steps": 100})
run = ckd_ray.open("runs/mine")
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckd_ray.api.run import Run as Run, open as open
    from ckd_ray.api.train import train as train

__version__ = "0.3.0"
__all__ = ["Run", "__version__", "train"]  # `open` stands in for Python's own, so `import *` leaves it out

if sys.argv and sys.argv[0].endswith("default_worker.py"):  # a worker process of Ray that runs our code
    from ckd_ray.ray_util.processes import end_when_broken

    end_when_broken()

# Imported on first use, because they import torch and Ray, which takes seconds.
_LAZY = {"Run": "run", "open": "run", "train": "train"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ckd_ray.api.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
