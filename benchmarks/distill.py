"""Distillation: the price of the teacher, and steps against a literal version and against sentence-transformers.

    python benchmarks/distill.py [--quick] [--data DIR] [--run DIR] [--peer-python PATH]
                                 [--only step|literal|peer|memory|labels]

`--run` takes a finished run (up to `label`); without it one is prepared first. `--peer-python` names a Python that has
sentence-transformers 6 with accelerate and datasets (this one when left out); without them that figure stays empty.
"""

from __future__ import annotations

import os
from typing import Any

from common import arguments, emit, machine, note


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args = arguments(
        __doc__ or "",
        run={"metavar": "DIR", "help": "a run that has its labels already"},
        peer_python={"metavar": "PATH", "help": "a Python with sentence-transformers, accelerate and datasets"},
    )
    before = machine()
    import torch
    from distill_label_cost import label_cost
    from distill_literal import steps_vs_literal
    from distill_memory import gradcache_memory
    from distill_peer import steps_vs_peer
    from distill_run import Part, distill_run
    from distill_step import teacher_price

    parts: dict[str, Part] = {
        "step": teacher_price,
        "literal": steps_vs_literal,
        "peer": steps_vs_peer,
        "labels": label_cost,
        "memory": gradcache_memory,
    }
    run = distill_run(args)
    settings: dict[str, Any] = {
        "quick": args.quick,
        "data": args.data,
        "run": args.run,
        "backbone": run.config["model"]["backbone"],
        "negatives": 1,
        "precision": "fp32",
        "threads": torch.get_num_threads(),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        if not args.only or name in args.only:
            note(f"measuring: {name}")
            found |= part(run, args, settings)
    emit(settings, found, before)


if __name__ == "__main__":
    main()
