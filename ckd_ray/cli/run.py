"""The commands that compute: train, tune, compare, evaluate, and single stages."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ckd_ray.cli.command import job_command, put
from ckd_ray.errors import UserError

SystemOption = Annotated[str, typer.Option("--system", help="`student` or `teacher`.")]


def _check_stages(
    start: str | None, until: str, config: str | None, set_: list[str] | None, generations: int, **_: Any
) -> None:
    from ckd_ray.checks import load_config
    from ckd_ray.pipeline.graph import check_stage_names, needed

    check_stage_names(start, until)
    if generations > 1 and (start is not None or until != "evaluate"):
        raise UserError(
            "a generation runs from the collection to the evaluation",
            where="--generations",
            expected="neither --from nor --until with it",
            found=f"--from {start}" if start is not None else f"--until {until}",
            fix="to do one stage of a generation again, delete its folder below the run and run the command again",
        )
    if start is None:
        return
    names = [stage.name for stage in needed(load_config(config, set_ or []), until)]
    if start not in names:
        raise UserError(
            f"{until} does not need this stage, so nothing would be done again",
            where="--from",
            expected=", ".join(names),
            found=start,
            fix="leave --until out, or name one of these; what is needed depends on distill.objective too",
        )


@job_command("train", _check_stages)
def train(
    config: Any,
    json_: bool,
    start: Annotated[str | None, typer.Option("--from", help="Do this stage and all that follow again.")] = None,
    until: Annotated[str, typer.Option("--until", help="Stop after this stage.")] = "evaluate",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do every stage again.")] = False,
    generations: Annotated[
        int,
        typer.Option("--generations", min=1, max=9, help="Train so many students, each the teacher of the next one."),
    ] = 1,
) -> None:
    """Run all stages: collection, teacher, embed, retrieve, label, distill, evaluate. Finished stages are skipped."""
    if generations == 1:
        _stages(config, json_, until=until, start=start, fresh=fresh)
        return
    from ckd_ray.pipeline.closing import closing_table, summary
    from ckd_ray.pipeline.generations import run_generations

    summaries = []
    for changed, reports in run_generations(config, generations, fresh=fresh):
        summaries.append(summary(changed, reports))
        if not json_:
            closing_table(changed, reports)
    if json_:
        put({**summaries[-1], "generations": summaries})


def _stages(config: Any, json_: bool, **options: Any) -> None:
    """Run the stages, and show the result."""
    from ckd_ray.pipeline.closing import closing_table, summary
    from ckd_ray.pipeline.runner import run_stages

    reports = run_stages(config, **options)
    if json_:
        put(summary(config, reports))
    else:
        closing_table(config, reports)


@job_command("tune")
def tune(
    config: Any,
    json_: bool,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away earlier searches of this run.")] = False,
) -> None:
    """Search for the best temperature, smoothing, beta, ... by trials on dev; train the winner in full."""
    from ckd_ray.tune.job import run_tune, show

    summary = run_tune(config, fresh=fresh)
    put(summary) if json_ else show(summary)


@job_command("compare")
def compare(
    config: Any,
    json_: bool,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train all students again.")] = False,
) -> None:
    """Train a student for every objective and seed under one budget, and test the differences."""
    from ckd_ray.compare.job import run_compare, show

    table = run_compare(config, fresh=fresh)
    put(table) if json_ else show(table)


def _stage_command(name: str, text: str) -> None:
    def stage(config: Any, json_: bool) -> None:
        _stages(config, json_, until=name)

    job_command(name, text=f"{text} Missing stages before it run first.")(stage)


_stage_command("embed", "Embed the corpus and the queries with the teacher.")
_stage_command("retrieve", "Rank the corpus for every training query.")


def _check_suggestions(suggest_top: int, suggest_min: float, **_: Any) -> None:
    from ckd_ray.inspection.suggest import SuggestSettings

    SuggestSettings(suggest_top, suggest_min).check()


@job_command("label", _check_suggestions)
def label(
    config: Any,
    json_: bool,
    suggest: Annotated[
        str | None,
        typer.Option(
            "--suggest", help="Write unlabelled passages that the labels call relevant here: query 0 passage score."
        ),
    ] = None,
    suggest_top: Annotated[int, typer.Option("--suggest-top", help="At most so many, the most probable.")] = 10_000,
    suggest_min: Annotated[float, typer.Option("--suggest-min", help="The least probability.")] = 0.1,
) -> None:
    """Write collective relevance labels for every training query. Missing stages before it run first."""
    _stages(config, json_, until="label")
    if suggest is not None:
        from ckd_ray.inspection.suggest import SuggestSettings, suggest as write
        from ckd_ray.progress import say
        from ckd_ray.runs.directory import RunContext

        count = write(RunContext.of(config).paths.root, suggest, SuggestSettings(suggest_top, suggest_min))
        say(f"suggest: {count:,} unlabelled passages -> {suggest}")


_stage_command("distill", "Distil the student.")


def _check_evaluate(against: str | None, system: str, against_system: str, cluster: str | None, **_: Any) -> None:
    from ckd_ray.ray_util.target import parse_target
    from ckd_ray.runs.directory import check_role

    check_role(system, "--system")
    check_role(against_system, "--against-system")
    target = parse_target(cluster)
    if against and not (target and target.remote):  # a job finds the other run on its cluster
        _other_side(against, against_system)


def _other_side(against: str, system: str) -> Any:
    from ckd_ray.evaluate.against import Side
    from ckd_ray.runs.finished import open_finished

    return Side.of(open_finished(against, "--against"), system)


@job_command("evaluate", _check_evaluate)
def evaluate(
    config: Any,
    json_: bool,
    against: Annotated[
        str | None, typer.Option("--against", help="Test the difference from another run, query by query.")
    ] = None,
    system: SystemOption = "student",
    against_system: Annotated[str, typer.Option("--against-system", help="`student` or `teacher` of that run.")] = (
        "student"
    ),
) -> None:
    """Compare the student with its teacher, the encoder as it is and BM25. Missing stages before it run first."""
    from ckd_ray.evaluate.against import Side, compare_runs, render_against
    from ckd_ray.pipeline.closing import closing_table, summary
    from ckd_ray.pipeline.runner import run_stages
    from ckd_ray.progress import say
    from ckd_ray.runs.directory import RunContext
    from ckd_ray.runs.finished import open_finished

    other = _other_side(against, against_system) if against else None
    reports = run_stages(config)
    found = None
    if other is not None:
        found = compare_runs(other, Side.of(open_finished(RunContext.of(config).paths.root), system))
    if json_:
        put({**summary(config, reports), **({"against": found} if found else {})})
        return
    closing_table(config, reports)
    if found:
        say("")
        say(render_against(found))
