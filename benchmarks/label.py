"""Retrieval and labels against literal, query-by-query versions of the published steps.

    python benchmarks/label.py [--quick] [--data DIR] [--run DIR] [--only retrieval|expansion|growth]

`--run` takes a finished run (up to `embed`) and measures on its store instead of embedding the collection first.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from common import arguments, emit, machine


def main() -> None:
    args = arguments(__doc__ or "", run={"metavar": "DIR", "help": "a run that has its embeddings already"})
    before = machine()
    from label_store import prepared_run

    run = prepared_run(args)
    found: dict[str, dict[str, Any]] = {}
    settings: dict[str, Any] = {"quick": args.quick, "data": args.data, **run.describe()}
    for name in ("retrieval", "expansion", "growth"):
        if not args.only or name in args.only:
            part: Callable[..., dict[str, dict[str, Any]]] = import_module(f"label_{name}").figures
            found |= part(run, args.quick, settings)
    emit(settings, found, before)


if __name__ == "__main__":
    main()
