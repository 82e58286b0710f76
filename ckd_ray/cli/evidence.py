"""The commands that show what a run is worth: evaluate, compare, tune, search, report."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Annotated, Any

import typer

from ckd_ray.cli import ConfigOption, JsonOption, QuietOption, SetOption, app, guarded, put, session
from ckd_ray.cli.jobs import ClusterOption, job_command
from ckd_ray.errors import UserError

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or the name of one in runs/.")]
SystemOption = Annotated[str, typer.Option("--system", help="`student` or `teacher`.")]


def _check_system(option: str, value: str) -> None:
    if value not in ("student", "teacher"):
        raise UserError("unknown system", where=option, expected="student or teacher", found=value)


def _check_systems(system: str, against_system: str, **_: Any) -> None:
    _check_system("--system", system)
    _check_system("--against-system", against_system)


@app.command()
@guarded
@job_command("evaluate", _check_systems)
def evaluate(
    config: ConfigOption = None,
    set_: SetOption = None,
    cluster: ClusterOption = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Test the difference from another run, query by query.")
    ] = None,
    system: SystemOption = "student",
    against_system: Annotated[str, typer.Option("--against-system", help="The other run's.")] = "student",
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare the student with its teacher, the encoder as it is and BM25. Missing stages before it are run first."""
    from ckd_ray.cli.show import closing_table, summary
    from ckd_ray.evaluate.against import Side, compare_runs, render_against
    from ckd_ray.progress import say
    from ckd_ray.runs.finished import open_finished

    other = Side.of(open_finished(against, "--against"), against_system) if against else None
    with session(config, set_, cluster, quiet) as loaded:
        from ckd_ray.pipeline.runner import run_stages
        from ckd_ray.runs.directory import RunContext

        reports = run_stages(loaded)
        found = None
        if other is not None:
            mine = Side.of(open_finished(RunContext.of(loaded).paths.root), system)
            found = compare_runs(other, mine)
        if json_:
            put({**summary(loaded, reports), **({"against": found} if found else {})})
            return
        closing_table(loaded, reports)
        if found:
            say("")
            say(render_against(found))


@app.command()
@guarded
def search(
    run: RunArgument,
    query: Annotated[str | None, typer.Argument(help="What to ask; a prompt when left out.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, max=1000, help="How many passages.")] = 10,
    system: SystemOption = "student",
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Ask the student. The words of a passage that match the query best are marked."""
    from ckd_ray.progress import say, set_quiet
    from ckd_ray.runs.finished import open_finished

    set_quiet(quiet)
    _check_system("--system", system)
    if json_ and query is None:
        raise UserError("--json needs a query", where="QUERY", fix='ckd-ray search RUN "what causes hives?" --json')
    if query is not None and not query.strip():
        raise UserError("the query is empty", where="QUERY", expected="some words")
    finished = open_finished(run)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ckd_ray.search.searcher import Searcher
    from ckd_ray.search.show import effort

    searcher = Searcher(finished, system)
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


def _show(searcher: Any, query: str, top: int) -> None:
    from ckd_ray.search.show import render_hit

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    columns = min(120, shutil.get_terminal_size((100, 24)).columns)
    for hit in searcher.search(query, top):
        typer.echo(render_hit(hit, colour=colour, columns=columns))


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


@app.command()
@guarded
@job_command("compare")
def compare(
    config: ConfigOption = None,
    set_: SetOption = None,
    cluster: ClusterOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train all students again.")] = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a student for every objective and seed under one budget, and test what the difference is worth."""
    with session(config, set_, cluster, quiet) as loaded:
        from ckd_ray.compare.job import run_compare, show

        table = run_compare(loaded, fresh=fresh)
        if json_:
            put(table)
        else:
            show(table)


@app.command()
@guarded
@job_command("tune")
def tune(
    config: ConfigOption = None,
    set_: SetOption = None,
    cluster: ClusterOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away earlier searches of this run.")] = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Search for the best temperature, smoothing, beta, ... by trials on dev; train the winner in full."""
    with session(config, set_, cluster, quiet) as loaded:
        from ckd_ray.tune.job import run_tune, show

        summary = run_tune(loaded, fresh=fresh)
        if json_:
            put(summary)
        else:
            show(summary)


@app.command()
@guarded
def report(
    run: RunArgument,
    out: Annotated[str | None, typer.Option("--out", help="The file to write; RUN/report.html when left out.")] = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write one HTML page about a run: measures, curves, queries won and lost, labels, stages, configuration."""
    from ckd_ray.progress import say, set_quiet
    from ckd_ray.report.page import write_report
    from ckd_ray.runs.finished import open_finished

    set_quiet(quiet)
    where = write_report(open_finished(run), out)
    if json_:
        put({"report": where})
    else:
        say(f"report: {where}")
