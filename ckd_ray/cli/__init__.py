"""The command line: parse, call one function, print. Ray and torch are imported inside the commands that need them."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, TextIO

import typer

from ckd_ray.cli.jobs import ClusterOption, job_command
from ckd_ray.errors import JobError, LostRayError, UserError, described
from ckd_ray.ray_util.again import remember, same_command

app = typer.Typer(
    name="ckd-ray",
    help="Distil collective relevance labels into a late-interaction (ColBERT) retriever, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="YAML configuration; the embedded quick start when left out."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Set one key: --set distill.temperature=0.3 (may be repeated)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no messages.")]


# Ray Data adds to a task's error how to let it be tried again.
_HINT_OF_RAY_DATA = "\nFailed to apply UDF transform after"


def main() -> None:
    """Entry point: exit status 0 done, 1 the job failed, 2 the user's input is wrong, 130 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(_fail("interrupted", 130))


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors end the process with a message and the right status, never with a traceback."""

    @functools.wraps(command)
    def call(*args: Any, **kwargs: Any) -> None:
        remember(fresh=kwargs.get("fresh", False), start=kwargs.get("start"))
        try:
            command(*args, **kwargs)
        except typer.Exit:  # the command has chosen its status itself
            raise
        except KeyboardInterrupt:
            code = _fail(f"interrupted; {same_command()} goes on where this one stopped", 130)
        except UserError as error:
            code = _fail(_told(error), 2)
        except LostRayError:  # ray_util/watch.py has said why
            code = 1
        except JobError as error:
            code = _fail(_told(error), 1)
        except Exception as error:  # whatever Ray or the system throws: the cause in a line, the traceback on request
            if os.environ.get("CKD_RAY_TRACEBACK"):
                raise
            hint = "CKD_RAY_TRACEBACK=1 shows the traceback"
            code = _fail(f"{described(error)}\n  ({hint})", 1)
        else:
            return
        raise typer.Exit(code)

    return call


def _terminate(signum: int, frame: Any) -> None:
    from ckd_ray.ray_util.watch import lost

    why = lost()
    if why is not None:
        raise LostRayError(why)
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    from ckd_ray.progress import printable

    print(f"ckd-ray: {printable(message)}", file=sys.stderr, flush=True)
    return code


def _told(error: BaseException) -> str:
    """The message of our own error. Raised in a task or an actor, it comes with Ray's traceback around it."""
    return str(getattr(error, "cause", error)).partition(_HINT_OF_RAY_DATA)[0]


_object_stream: TextIO | None = None


def put(value: Any) -> None:
    """Print the one object of `--json`, on the standard output that the command was started with. Keys in URIs are
    hidden: what a program reads is logged as well.

    A job's output comes home with all that it says to people: there the object's line begins with a mark.
    """
    from ckd_ray.progress import without_keys

    mark = os.environ.get("CKD_RAY_OBJECT_MARK", "")
    start = f"\n{mark}" if mark else ""
    typer.echo(start + json.dumps(without_keys(value)), file=_object_stream or sys.stdout)


@contextmanager
def _nothing_else_on_stdout() -> Iterator[None]:
    """Ray prints warnings of its daemons to standard output; they are for people, and go where people's output goes."""
    global _object_stream
    _object_stream = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _object_stream = None


@contextmanager
def session(config: str | None, overrides: list[str] | None, cluster: str | None, quiet: bool) -> Iterator[Any]:
    """The configuration, checked before anything starts, and Ray around the block."""
    from ckd_ray.checks import load_config
    from ckd_ray.progress import set_quiet

    set_quiet(quiet)
    loaded = load_config(config, overrides or [])
    from ckd_ray.jobs.nodes import check_nodes_see, wait_for_nodes
    from ckd_ray.jobs.placeholders import check_config_filled_in
    from ckd_ray.ray_util.session import connected

    check_config_filled_in(loaded)

    with _nothing_else_on_stdout(), connected(cluster):
        signal.signal(signal.SIGTERM, _terminate)  # Ray has put its own handler in place, which exits without a word
        wait_for_nodes()
        check_nodes_see(loaded)
        yield loaded


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Distil collective relevance labels into a late-interaction (ColBERT) retriever, on Ray."""
    if version:
        from ckd_ray import __version__

        typer.echo(__version__)
        raise typer.Exit()


def _check_stages(
    start: str | None, until: str, config: str | None, set_: list[str] | None, generations: int = 1, **_: Any
) -> None:
    from ckd_ray.checks import load_config
    from ckd_ray.pipeline.graph import check_stage_names, needed

    check_stage_names(start, until)
    if generations > 1 and (start is not None or until != "evaluate"):
        raise UserError(
            "generations are trained whole, from the collection to the evaluation",
            where="--generations",
            expected="neither --from nor --until beside it",
            found=f"--from {start}" if start is not None else f"--until {until}",
            fix="to do one stage of a generation again, delete its folder below the run and run the command again",
        )
    if start is None:
        return
    names = [stage.name for stage in needed(load_config(config, set_ or []), until)]
    if start not in names:  # it would be passed over, and nothing done again
        raise UserError(
            f"{until} does not need this stage, so nothing would be done again",
            where="--from",
            expected=", ".join(names),
            found=start,
            fix="leave --until out, or name one of these; what is needed depends on distill.objective too",
        )


@app.command()
@guarded
@job_command("train", _check_stages)
def train(
    config: ConfigOption = None,
    set_: SetOption = None,
    cluster: ClusterOption = None,
    start: Annotated[str | None, typer.Option("--from", help="Do this stage and all that follow again.")] = None,
    until: Annotated[str, typer.Option("--until", help="Stop after this stage.")] = "evaluate",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do every stage again.")] = False,
    generations: Annotated[
        int,
        typer.Option(
            "--generations", min=1, max=9, help="Train so many students; each is the teacher of the next one."
        ),
    ] = 1,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the whole job: collection, teacher, embed, retrieve, label, distill, evaluate. Run again, it goes on."""
    with session(config, set_, cluster, quiet) as loaded:
        if generations == 1:
            _stages(loaded, json_, until=until, start=start, fresh=fresh)
        else:
            _generations(loaded, json_, generations, fresh)


def _generations(config: Any, json_: bool, count: int, fresh: bool) -> None:
    """Train `count` generations, and show what came of each."""
    from ckd_ray.cli.show import closing_table, summary
    from ckd_ray.pipeline.generations import run_generations

    made = []
    for changed, reports in run_generations(config, count, fresh=fresh):
        made.append(summary(changed, reports))
        if not json_:
            closing_table(changed, reports)
    if json_:
        put({**made[-1], "generations": made})


def _stages(config: Any, json_: bool, **options: Any) -> None:
    """Run the stages, and show what came of it."""
    from ckd_ray.cli.show import closing_table, summary
    from ckd_ray.pipeline.runner import run_stages

    reports = run_stages(config, **options)
    if json_:
        put(summary(config, reports))
    else:
        closing_table(config, reports)


def _stage_command(name: str, text: str) -> None:
    @guarded
    @job_command(name)
    def command(
        config: ConfigOption = None,
        set_: SetOption = None,
        cluster: ClusterOption = None,
        json_: JsonOption = False,
        quiet: QuietOption = False,
    ) -> None:
        with session(config, set_, cluster, quiet) as loaded:
            _stages(loaded, json_, until=name)

    app.command(name=name, help=f"{text} Stages before it that are missing are run first.")(command)


_stage_command("embed", "Embed the corpus and the queries with the teacher.")
_stage_command("retrieve", "Rank the corpus for every training query.")


def _check_suggestions(suggest_top: int, suggest_min: float, **_: Any) -> None:
    from ckd_ray.labels.suggest import SuggestSettings

    SuggestSettings(suggest_top, suggest_min).check()


@app.command()
@guarded
@job_command("label", _check_suggestions)
def label(
    config: ConfigOption = None,
    set_: SetOption = None,
    cluster: ClusterOption = None,
    suggest: Annotated[
        str | None,
        typer.Option(
            "--suggest", help="Then write unlabelled passages that the labels call relevant: query 0 passage score."
        ),
    ] = None,
    suggest_top: Annotated[int, typer.Option("--suggest-top", help="At most so many, the most probable.")] = 10_000,
    suggest_min: Annotated[float, typer.Option("--suggest-min", help="The least probability.")] = 0.1,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write collective relevance labels for every training query. Stages before it that are missing are run first."""
    with session(config, set_, cluster, quiet) as loaded:
        _stages(loaded, json_, until="label")
        if suggest is not None:
            from ckd_ray.labels.suggest import SuggestSettings, suggest as write
            from ckd_ray.progress import say
            from ckd_ray.runs.directory import RunContext

            count = write(RunContext.of(loaded).paths.root, suggest, SuggestSettings(suggest_top, suggest_min))
            say(f"suggest: {count:,} unlabelled passages -> {suggest}")


@app.command()
@guarded
def inspect(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory: runs/NAME.")],
    query_id: Annotated[str, typer.Argument(metavar="QUERY_ID", help="The id of a training query.")],
    top: Annotated[int, typer.Option("--top", min=1, max=1000, help="Passages of the ranking to compare.")] = 10,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Why a query has its labels: feedback, expansion, and one-hot against teacher against collective labels."""
    from ckd_ray.labels.inspect import inspect_query, render
    from ckd_ray.progress import printable, set_quiet

    set_quiet(quiet)
    found = inspect_query(run, query_id, top)
    put(found) if json_ else typer.echo(printable(render(found)), err=True)


_stage_command("distill", "Distil the student.")


@app.command()
@guarded
def export(
    run: Annotated[str, typer.Argument(help="A run directory (run.storage/run.name), or one checkpoint folder.")],
    fmt: Annotated[str, typer.Option("--format", help="sentence-transformers, pylate or colbert.")],
    out: Annotated[str | None, typer.Option("--out", help="The folder to write. Default: RUN/exports/FORMAT.")] = None,
    model: Annotated[str, typer.Option("--model", help="student or teacher.")] = "student",
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a run's model for sentence-transformers, PyLate or colbert-ai, with a model card."""
    from ckd_ray.pipeline.export import export_run
    from ckd_ray.progress import say, set_quiet

    set_quiet(quiet)
    written = export_run(run, fmt, out=out, role=model)
    for difference in written["differences"]:
        say(f"export: {difference}")
    say(f"export: {written['model']} -> {written['out']}")
    if json_:
        put(written)


# These put their commands on `app`.
from ckd_ray.cli import clusters, evidence, machine, plan  # noqa: E402, F401
