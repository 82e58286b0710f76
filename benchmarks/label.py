"""Retrieval and labels against literal, query-by-query versions of the published steps.

    python benchmarks/label.py [--quick] [--data DIR] [--run DIR] [--only retrieval|expansion|growth]

`--run` takes a finished run (up to `embed`) and measures on its store instead of embedding the collection first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common import arguments, emit, machine


def main() -> None:
    args = arguments(__doc__ or "", run={"metavar": "DIR", "help": "a run that has its embeddings already"})
    before = machine()
    import label_expansion
    import label_growth
    import label_retrieval
    from label_store import prepared_run

    run = prepared_run(args)
    parts: dict[str, Callable[..., dict[str, dict[str, Any]]]] = {
        "retrieval": label_retrieval.figures,
        "expansion": label_expansion.figures,
        "growth": label_growth.figures,
    }
    found: dict[str, dict[str, Any]] = {}
    settings: dict[str, Any] = {"quick": args.quick, "data": args.data, **run.describe()}
    for name, part in parts.items():
        if not args.only or name in args.only:
            found |= part(run, args.quick, settings)
    emit(settings, found, before)


if __name__ == "__main__":
    main()
