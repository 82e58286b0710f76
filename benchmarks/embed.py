"""The embed stage and its store: rates against plain loops, growth, memory, many accelerators, 2-bit codes, cold reads.

    python benchmarks/embed.py [--quick] [--data DIR] [--run DIR] [--only rates|growth|accelerators|codec|int8|reads]

`--run` takes a finished run (up to `embed`, with an fp16 store) and never writes to it. It gives the trained teacher
that the ranking of 2-bit codes should be judged with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common import arguments, emit, machine, note


def main() -> None:
    args = arguments(__doc__ or "", run={"metavar": "DIR", "help": "a run that has its embeddings already"})
    before = machine()
    import embed_accelerators
    import embed_codec
    import embed_growth
    import embed_int8
    import embed_rates

    parts: dict[str, Callable[..., dict[str, dict[str, Any]]]] = {
        "rates": embed_rates.figures,
        "growth": embed_growth.figures,
        "accelerators": embed_accelerators.figures,
        "codec": embed_codec.figures,
        "int8": embed_int8.figures,
        "reads": embed_codec.reads,
    }
    found: dict[str, dict[str, Any]] = {}
    settings: dict[str, Any] = {"quick": args.quick, "data": args.data, "run": args.run}
    for name, part in parts.items():
        if not args.only or name in args.only:
            note(f"-- {name}")
            found |= part(args, settings)
    emit(settings, found, before)


if __name__ == "__main__":
    main()
