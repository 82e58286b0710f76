"""The commands that look at a finished run: report, inspect, search."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Annotated, Any

import typer

from ckd_ray.cli.command import LOOK, command, put, terminate
from ckd_ray.cli.run import SystemOption
from ckd_ray.errors import UserError
from ckd_ray.progress import say
from ckd_ray.streams import may_colour, only_ours

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or the name of one in runs/.")]


@command(LOOK)
def report(
    run: RunArgument,
    json_: bool,
    out: Annotated[str | None, typer.Option("--out", help="The file to write. Default: RUN/report.html.")] = None,
) -> None:
    """Write one HTML page about a run: measures, curves, queries won and lost, labels, stages, configuration."""
    from ckd_ray.report.page import write_report
    from ckd_ray.runs.finished import open_finished

    where = write_report(open_finished(run), out)
    put({"report": where}) if json_ else say(f"report: {where}")


@command(LOOK)
def inspect(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory: runs/NAME.")],
    query_id: Annotated[str, typer.Argument(metavar="QUERY_ID", help="The id of a training query.")],
    json_: bool,
    top: Annotated[int, typer.Option("--top", min=1, max=1000, help="Passages of the ranking to compare.")] = 10,
) -> None:
    """Show why a query has its labels: feedback, expansion, and one-hot, teacher and collective labels."""
    from ckd_ray.inspection.inspect import inspect_query, render

    found = inspect_query(run, query_id, top)
    put(found) if json_ else say(render(found), always=True)


@command(LOOK, prompts=True)
def search(
    run: RunArgument,
    json_: bool,
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="The query. Default: a prompt.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, max=1000, help="How many passages.")] = 10,
    system: SystemOption = "student",
    index: Annotated[
        bool, typer.Option("--index", help="Make an index of a large store, once; later searches use it.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Read the whole store, although there is an index.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Answer POST /search over HTTP until Ctrl-C.")] = False,
    host: Annotated[str, typer.Option("--host", help="Of --serve: the address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Of --serve: the port.")] = 8000,
    replicas: Annotated[int, typer.Option("--replicas", min=1, max=64, help="Of --serve: processes that answer.")] = 1,
) -> None:
    """Search with the student. The words of a passage that match the query best are marked."""
    from ckd_ray.runs.directory import check_role
    from ckd_ray.runs.finished import open_finished

    check_role(system, "--system")
    if index and exact:
        raise UserError("--exact uses no index", where="--index with --exact", fix="leave one of them out")
    if serve:
        if exact:
            raise UserError("the service uses an index if there is one", where="--exact with --serve")
        asked = query is not None or json_
        _serve(open_finished(run), system, host, port, replicas, "make" if index else "use", asked=asked)
        return
    if json_ and query is None:
        raise UserError("--json needs a query", where="QUERY", fix='ckd-ray search RUN "what causes hives?" --json')
    if query is not None and not query.strip():
        raise UserError("the query is empty", where="QUERY", expected="some words")
    finished = open_finished(run)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ckd_ray.search.searcher import Searcher
    from ckd_ray.search.show import effort

    searcher = Searcher(finished, system, index="make" if index else "none" if exact else "use")
    if searcher.index is None:
        note = effort(searcher.store.num_tokens, searcher.store.manifest["bytes"])
        if note:
            say(note)
    if query is None:
        _prompt(searcher, top)
    elif json_:
        hits = [hit.to_dict() for hit in searcher.search(query, top)]
        put({"run": finished.paths.folder, "system": system, "query": query, "hits": hits})
    else:
        _show(searcher, query, top)


def _serve(run: Any, system: str, host: str, port: int, replicas: int, index: Any, *, asked: bool) -> None:
    from ckd_ray.search.searcher import Searcher
    from ckd_ray.serve.job import ServeOptions, check_can_serve, serve_until_told

    if asked:
        raise UserError("--serve takes queries over HTTP", where="--serve", fix="leave QUERY and --json out")
    options = ServeOptions(host, port, replicas)
    check_can_serve(options)
    Searcher(run, system, index=index)  # refuses what cannot be searched, and makes the index, before Ray starts
    with only_ours():
        serve_until_told(run, system, options, terminate)


def _show(searcher: Any, query: str, top: int) -> None:
    from ckd_ray.search.show import render_hit

    columns = min(120, shutil.get_terminal_size((100, 24)).columns)
    for hit in searcher.search(query, top):
        typer.echo(render_hit(hit, colour=may_colour(sys.stdout), columns=columns))


def _prompt(searcher: Any, top: int) -> None:
    """Read queries until the end of the input, `exit` or `quit`. Ctrl-C ends it as well, with status 130."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (arrow keys and history in input())

        typer.echo(f"{searcher.store.num_passages:,} passages; an empty line, exit or Ctrl-D ends", err=True)
    while True:
        try:
            line = input("query> " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        if line in ("exit", "quit") or (terminal and not line):
            return
        if line:
            if not terminal:
                typer.echo(f"query: {line}")
            _show(searcher, line, top)
            typer.echo("")
