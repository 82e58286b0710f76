"""The command line: parse, call one function, print. Ray and torch are imported inside the commands that need them."""

from __future__ import annotations

from typing import Annotated

import typer

from ckd_ray.cli.command import app, main

__all__ = ["app", "main"]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Distil collective relevance labels into a late-interaction (ColBERT) retriever, on Ray."""
    if version:
        from ckd_ray import __version__

        typer.echo(__version__)
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# Each import puts its commands on `app`; `--help` shows them in this order.
from ckd_ray.cli import begin, run, look, share, plan, doctor, clusters  # noqa: E402, F401, I001
