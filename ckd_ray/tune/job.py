"""`ckd-ray tune`: the two passes, then the full training of the winner and its comparison with the configuration.

All trials share the run's stages upstream of the labels. Labels of other settings are computed once, for all trials
that share them. After an interruption the same command resumes.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ckd_ray.config import Config
from ckd_ray.data import Collection
from ckd_ray.errors import UserError
from ckd_ray.evaluate.against import Side, compare_runs
from ckd_ray.files import delete, exists, join, read_json, write_atomic, write_json_atomic
from ckd_ray.pipeline.graph import needed
from ckd_ray.pipeline.runner import run_stages
from ckd_ray.pipeline.stage import Stage
from ckd_ray.pipeline.stages.distill import distill_seed
from ckd_ray.pipeline.training import distill_task
from ckd_ray.progress import say, without_keys, without_secrets
from ckd_ray.runs.artifact import fingerprint_of, seconds_of
from ckd_ray.runs.directory import BEST, LABELS, RunContext, RunDir, labels_folder
from ckd_ray.runs.fingerprint import fingerprint
from ckd_ray.runs.finished import open_finished
from ckd_ray.runs.lock import run_lock
from ckd_ray.tracking import TrackedRun, tracked
from ckd_ray.tune.first_pass import first_pass
from ckd_ray.tune.records import Records, Trial
from ckd_ray.tune.search import search, shown, trial_task
from ckd_ray.tune.space import Values, candidates, space_of, split, values_of, with_values
from ckd_ray.tune.suggest import Suggester, check_installed, importance

_OF_THE_SEARCH = ("search", "label_candidates", "label_kept", "measurements", "grace", "reduction", "dev_queries",
                  "dev_passages")  # fmt: skip


def run_tune(config: Config, *, fresh: bool = False) -> dict[str, Any]:
    """Search, retrain the winner in full, compare it with the configuration, and write `tune/best.yaml`,
    `trials.parquet` and `summary.json`. Ray must be connected. Returns the summary.

    Args:
        fresh: delete the results of earlier searches of this run.

    Raises:
        UserError: Optuna is missing, the collection has no dev split, or the trials do not fit the cluster.
        JobError: no trial could be finished.
    """
    check_installed(config.tune.search)
    context = RunContext.of(config)
    if fresh:
        with run_lock(context.paths.root):  # another command may be at work in it
            delete(context.paths.tune)
    run_stages(config, until="collection")  # what it lacks is refused before anything is trained
    splits = Collection.open(context.paths.root).splits
    if "dev" not in splits:
        raise UserError(
            "the search needs labelled dev queries",
            where="collection.dev",
            expected="a dev split",
            found=", ".join(splits),
        )
    upstream = [stage for stage in needed(config, "distill") if stage.name != "distill"]
    read = {name for stage in upstream for name in stage.inputs(config)}
    for stage in upstream:
        if stage.name not in read:  # the others come with those that read them
            run_stages(config, until=stage.name)
    space = space_of(config)
    seed = config.run.seed if config.tune.seed is None else config.tune.seed
    identity = _search_fingerprint(config, context, upstream, seed)
    folder = join(context.paths.tune, f"search-{identity[:12]}")
    with run_lock(context.paths.root):
        kept, passed, first_seconds = _first(context, config, folder, seed)
    for combination in kept:
        _label(config, combination)
    with run_lock(context.paths.root):
        records = _trials(context, config, folder, kept, seed, identity)
        best = records.best()
        assert best is not None
        found = with_values(config, best.values)
        _write_best(context, found, best)
        _write_trials(context, records)
    summary = {
        "run": context.paths.root,
        "trials": records.rows(),
        "best": {"trial": best.number, "mrr@10": best.best, **best.values},
        "default": values_of(config, space),
        "first_pass": passed,
        "agreement": _agreement(passed, records),
        "importance": importance(records.ended()),
        "saved": _saved(config, records, upstream, context, kept, first_seconds),
        "comparison": _retrained(config, found, best) if config.tune.retrain else None,
        "seed": seed,
    }
    with run_lock(context.paths.root):
        write_json_atomic(join(context.paths.tune, "summary.json"), without_keys(summary))
    return summary


def _search_fingerprint(config: Config, context: RunContext, upstream: list[Stage], seed: int) -> str:
    """The fingerprint of all inputs of a trial besides its values. The number of trials is not one: it may grow."""
    t = config.tune.model_dump(mode="json")
    return fingerprint(
        inputs={stage.name: fingerprint_of(stage.output(context.paths)) for stage in upstream},
        distill=config.distill.for_fingerprint(),
        label=config.label.model_dump(mode="json"),
        space={key: [p.kind, list(p.values)] for key, p in space_of(config).items()},
        tune={key: t[key] for key in _OF_THE_SEARCH},
        seed=[seed, distill_seed(config)],
    )


def _first(
    context: RunContext, config: Config, folder: str, seed: int
) -> tuple[list[Values], list[dict[str, Any]], float]:
    """(the combinations that go on to trials, the configuration's own among them; the results of the first pass; its
    seconds)."""
    first, _ = split(space_of(config), config)
    if not first:
        return [{}], [], 0.0
    path = join(folder, "first_pass.json")
    if exists(path):
        kept_file = read_json(path)
        if isinstance(kept_file, list):  # an earlier version kept no time
            kept_file = {"seconds": 0.0, "found": kept_file}
        found: list[dict[str, Any]] = kept_file["found"]
        seconds = float(kept_file["seconds"])
    else:
        combinations = candidates(config, first, config.tune.label_candidates, seed)
        say(f"tune: first pass, {len(combinations)} combinations of {', '.join(first)}, without training")
        scores, seconds = first_pass(context, join(folder, "first"), combinations)
        found = [{"values": v, "mrr@10": score} for v, score in zip(combinations, scores, strict=True)]
        write_json_atomic(path, {"seconds": seconds, "found": found})
    others = sorted(found[1:], key=lambda entry: -entry["mrr@10"])
    kept = [found[0], *others[: config.tune.label_kept - 1]]
    for entry in kept:
        values = ", ".join(f"{key.partition('.')[2]} {shown(v)}" for key, v in entry["values"].items())
        own = " (as configured)" if entry is found[0] else ""
        say(f"  teacher's MRR@10 on dev {entry['mrr@10']:.4f}: {values}{own}")
    return [entry["values"] for entry in kept], found, seconds


def _labels_folder(config: Config, values: Values) -> str:
    """The folder of the labels of these values, below the run."""
    mine = with_values(config, values)
    return LABELS if mine.label == config.label else labels_folder(mine.label.model_dump(mode="json"))


def _label(config: Config, values: Values) -> None:
    """Compute the labels of the training queries with these settings, unless they exist."""
    folder = _labels_folder(config, values)
    if folder != LABELS:
        run_stages(with_values(config, values), until="label", labels=folder)


def _trials(context: RunContext, config: Config, folder: str, kept: list[Values], seed: int, identity: str) -> Records:
    space = space_of(config)
    records = Records(join(folder, "trials"))
    suggester = Suggester(
        kept,
        split(space, config)[1],
        values_of(config, space),
        search=config.tune.search,
        seed=seed,
        trials=config.tune.trials,
    )
    base = distill_task(context, identity, keep=folder)

    def task_of(number: int, values: Values) -> Any:
        mine = with_values(config, values)
        trial_identity = fingerprint(search=identity, trial=number, values=values)
        return trial_task(base, mine, trial_identity, _labels_folder(config, values))

    search(config, folder, records, suggester, task_of, lambda trial: _track(context, folder, trial))
    return records


def _track(context: RunContext, folder: str, trial: Trial) -> None:
    """Tell the trackers of a trial that has ended: a run of its own, with the values of the search as configuration."""
    config, name = context.config, f"trial-{trial.number:05d}"
    run = TrackedRun(
        name=f"{config.run.name}/{name}",
        group=config.run.name,
        project=config.tracking.project,
        config=trial.values,
        folder=join(folder, "tracking", name),
    )
    with tracked(config.tracking, run) as tracking:
        for steps, measured, _ in trial.measurements:
            tracking.scalars({"trial/mrr@10": measured}, int(steps))
        best = {} if trial.best is None else {"trial/best_mrr@10": trial.best}
        tracking.summary({**best, "trial/steps": trial.steps, "trial/seconds": trial.seconds})


def _write_best(context: RunContext, found: Config, best: Trial) -> None:
    tree = found.model_dump(mode="json", exclude={"tune"})
    head = f"# Found by ckd-ray tune: trial {best.number}, MRR@10 {best.best:.4f} on the dev queries of its trials.\n"
    # Keys in URIs belong in the environment (store.md), not in files that users share.
    text = without_secrets(head + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120)).encode()
    write_atomic(join(context.paths.tune, "best.yaml"), lambda stream: stream.write(text))


def _write_trials(context: RunContext, records: Records) -> None:
    rows = records.rows()
    # Parquet has one type a column, so a column of numbers and words (`auto`) is written as words.
    mixed = {key for row in rows for key, value in row.items() if isinstance(value, str)}
    table = pa.Table.from_pylist(
        [{k: str(v) if k in mixed and v is not None else v for k, v in r.items()} for r in rows]
    )
    write_atomic(join(context.paths.tune, "trials.parquet"), lambda stream: pq.write_table(table, stream))


def _retrained(config: Config, found: Config, best: Trial) -> dict[str, Any] | None:
    """Train the winner and the configuration in full, and compare them on all of dev and test."""
    say("tune: the configuration as it is, in full")
    run_stages(config)
    if best.number == 0:
        say("tune: no trial was better than the configuration itself")
        return None
    say("tune: the best trial, in full")
    run_stages(found, variant=BEST, labels=_labels_folder(config, best.values))
    run = RunContext.of(config).paths
    other, mine = (Side.of(open_finished(at), "student") for at in (run.root, run.variant(BEST).folder))
    return compare_runs(other, mine)


def _agreement(passed: list[dict[str, Any]], records: Records) -> dict[str, Any] | None:
    """How well the first pass predicts the second: Spearman's rank correlation, over the combinations of the trials,
    between the teacher's MRR@10 and the best student's. None with fewer than three combinations."""
    import pandas as pd

    best: dict[str, tuple[float, float]] = {}
    for entry in passed:
        own = [
            t.best
            for t in records.ended()
            if t.best is not None and all(t.values[key] == value for key, value in entry["values"].items())
        ]
        if own:
            best[str(entry["values"])] = (entry["mrr@10"], max(own))
    if len(best) < 3:
        return None
    frame = pd.DataFrame(best.values(), columns=["teacher", "student"])
    rho = frame["teacher"].rank().corr(frame["student"].rank())
    return {"spearman": None if pd.isna(rho) else round(float(rho), 4), "combinations": len(best)}


def _saved(
    config: Config,
    records: Records,
    upstream: list[Stage],
    context: RunContext,
    kept: list[Values],
    first_seconds: float,
) -> dict[str, float]:
    """The time that stopping and sharing saved. The search, with its first pass and the labels of all combinations that
    it kept, is compared with one full pipeline a trial: everything upstream, and all steps at the rate of the finished
    trials. Evaluation counts in neither."""
    shared = sum(seconds_of(stage.output(context.paths)) for stage in upstream)
    others = {_labels_folder(config, values) for values in kept} - {LABELS}  # those are upstream
    labels = sum(seconds_of(context.paths.with_labels(name).labels) for name in others)
    trials = [t for t in records.trials.values() if t.measurements]
    finished = [t for t in trials if t.state == "finished"]
    whole = sum(t.seconds for t in finished) / max(1, len(finished))
    spent = shared + first_seconds + labels + sum(t.seconds for t in trials)
    pipelines = len(trials) * (shared + whole)
    return {
        "search_seconds": round(spent, 1),
        "as_pipelines_seconds": round(pipelines, 1),
        "share": round(1 - spent / pipelines, 4) if pipelines else 0.0,
        "steps_share": round(sum(t.steps for t in trials) / max(1, len(trials) * config.distill.steps), 4),
    }


def show(summary: dict[str, Any]) -> None:
    """The result for people."""
    best = summary["best"]
    values = {key: v for key, v in best.items() if key not in ("trial", "mrr@10")}
    changed = {key: v for key, v in values.items() if summary["default"].get(key) != v}
    say("")
    say(f"best of {len(summary['trials'])} trials: number {best['trial']}, MRR@10 {best['mrr@10']:.4f} on dev")
    for key, value in (changed or values).items():
        say(f"  {key}: {shown(value)}  ({shown(summary['default'][key])} in the configuration)")
    if summary["agreement"]:
        a = summary["agreement"]
        say(f"first pass against trials: rank correlation {a['spearman']} over {a['combinations']} combinations")
    saved = summary["saved"]
    say(f"the search took {100 * (1 - saved['share']):.0f} % of the time of one full pipeline a trial")
    if summary["comparison"]:
        from ckd_ray.evaluate.against import render_against

        say("")
        say(render_against(summary["comparison"]))
    say("")
    say(join(RunDir(summary["run"]).tune, "best.yaml"))
