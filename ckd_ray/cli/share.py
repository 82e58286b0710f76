"""The command that passes a model on: export."""

from __future__ import annotations

from typing import Annotated

import typer

from ckd_ray.cli.command import SHARE, command, put
from ckd_ray.progress import say


@command(SHARE)
def export(
    run: Annotated[str, typer.Argument(help="A run directory (run.storage/run.name), or one checkpoint folder.")],
    fmt: Annotated[str, typer.Option("--format", help="sentence-transformers, pylate or colbert.")],
    json_: bool,
    out: Annotated[str | None, typer.Option("--out", help="The folder to write. Default: RUN/exports/FORMAT.")] = None,
    model: Annotated[str, typer.Option("--model", help="student or teacher.")] = "student",
) -> None:
    """Write a run's model for sentence-transformers, PyLate or colbert-ai, with a model card."""
    from ckd_ray.pipeline.export import export_run

    written = export_run(run, fmt, out=out, role=model)
    for difference in written["differences"]:
        say(f"export: {difference}")
    say(f"export: {written['model']} -> {written['out']}")
    if json_:
        put(written)
