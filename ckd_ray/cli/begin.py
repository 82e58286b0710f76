"""The command that comes first: init."""

from __future__ import annotations

from typing import Annotated

import typer

from ckd_ray.cli.command import RUN, command, put
from ckd_ray.progress import say


@command(RUN)
def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder with your passages, queries and labels.")],
    json_: bool,
    output: Annotated[str, typer.Option("--output", "-o", help="The configuration to write.")] = "config.yaml",
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="The file of the passages, if it is not found.")
    ] = None,
    queries: Annotated[
        list[str] | None, typer.Option("--queries", help="The file of the queries, or one for each split (repeatable).")
    ] = None,
    qrels: Annotated[
        list[str] | None, typer.Option("--qrels", help="The file of the labels, or one for each split (repeatable).")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**31 - 1, help="Decides which queries are set aside.")
    ] = 17,
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier call has written.")] = False,
) -> None:
    """Write a configuration for a folder of your files (TSV, CSV, JSON lines, Parquet), and say what they hold."""
    from ckd_ray.init import Options, as_json, draft_config, render

    draft = draft_config(folder, Options(output, corpus, queries or (), qrels or (), seed, force))
    put(as_json(draft)) if json_ else say(render(draft))
