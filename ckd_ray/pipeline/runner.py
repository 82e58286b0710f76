"""Brings a run up to a stage: plan which stages that takes, verify what each one reads, run it, record what it did."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from ckd_ray.config import Config
from ckd_ray.errors import JobError, LostRayError, UserError
from ckd_ray.files import delete
from ckd_ray.pipeline.graph import check_stage_names, needed, stage_fingerprint
from ckd_ray.pipeline.repair import remove_broken_files
from ckd_ray.pipeline.stage import Stage
from ckd_ray.progress import Progress, duration, say, without_keys
from ckd_ray.ray_util.frames import let_go
from ckd_ray.ray_util.machines import wait_for_gpus
from ckd_ray.ray_util.watch import lost
from ckd_ray.runs.artifact import content_fingerprint, is_made, make, manifest_of, remove_altered, remove_manifest
from ckd_ray.runs.directory import LABELS, RunContext
from ckd_ray.runs.lock import run_lock
from ckd_ray.runs.record import write_record
from ckd_ray.tracking import TrackedRun, tracked

# How often one command replaces damaged files; storage that damages them more often is not fit for use.
_MOST_REPAIRS = 20


@dataclass(frozen=True)
class StageReport:
    """What a stage did: `skipped` when it was done before; seconds and figures are those of the run that did it."""

    name: str
    skipped: bool
    seconds: float
    figures: dict[str, Any]
    where: str


class _BeginAgainError(Exception):
    """Files of a finished stage were damaged and are removed: the stages have to be gone through from the first."""


def run_stages(
    config: Config,
    *,
    until: str = "evaluate",
    start: str | None = None,
    fresh: bool = False,
    variant: str | None = None,
    labels: str = LABELS,
) -> list[StageReport]:
    """Bring the run up to `until`. Ray must be connected.

    Args:
        start: this stage and all that follow are done again even if they are there.
        fresh: remove the whole run first.
        variant, labels: folders below the run for this student and these labels (see `RunDir`).

    Raises:
        UserError: a stage name is unknown, another process holds the run, or a later version has written it.
        JobError: files of finished stages are damaged again and again.
    """
    from ckd_ray.data import source_signature

    check_stage_names(start, until)
    context = RunContext.of(config, variant, labels)
    source = source_signature(config.collection)
    with run_lock(context.paths.root):
        stages = needed(config, until)
        names = [stage.name for stage in stages]
        if variant or labels == LABELS:  # run.json is that of the run's own settings
            write_record(context)
        if fresh:
            for folder in (*(stage.output(context.paths) for stage in stages), *context.paths.extras):
                delete(folder)
        again = set(names[names.index(start) :]) if start in names else set()
        reports: dict[str, StageReport] = {}
        with _tracked(context) as context:
            for _ in range(1 + _MOST_REPAIRS):
                try:
                    _go_through(context, stages, source, again, reports)
                except _BeginAgainError:
                    continue
                return [reports[name] for name in names]
        raise JobError(f"{context.paths.root}: its files were damaged {1 + _MOST_REPAIRS} times while this command ran")


@contextmanager
def _tracked(context: RunContext) -> Iterator[RunContext]:
    """The context with the trackers of the configuration."""
    config, paths = context.config, context.paths
    group = config.run.name
    run = TrackedRun(
        name=f"{group}/{paths.variant_name}" if paths.variant_name else group,
        group=group,
        project=config.tracking.project,
        config=without_keys(config.model_dump(mode="json", exclude=set(config.operational_keys()))),
        folder=paths.tracking,
    )
    with tracked(config.tracking, run) as tracking:
        yield replace(context, tracking=tracking)


def _go_through(
    context: RunContext, stages: list[Stage], source: str, again: set[str], reports: dict[str, StageReport]
) -> None:
    """Run every stage that is not done.

    Args:
        again: names of stages that are done again even if they are there; each is struck out once that has begun.
        reports: gets what every stage did. A stage that has worked keeps that report when it is gone through again.

    Raises:
        _BeginAgainError: files of an earlier stage were damaged. Making them again can change what later stages read.
    """
    identities: dict[str, str] = {}
    gpus = False
    for i, stage in enumerate(stages):
        fingerprint = stage_fingerprint(stage, context.config, identities, source)
        output, checkpoints = stage.output(context.paths), context.paths.training_checkpoints(stage.name, fingerprint)
        if stage.name in again:
            again.remove(stage.name)
            delete(output)
            delete(checkpoints)
        if is_made(output, fingerprint):
            report = _done_before(context, stage)
        else:
            gpus = wait_for_gpus(expected=gpus)
            _verify(context, stages[:i])
            report = _work(context, stage, fingerprint, stages[:i])
        delete(checkpoints)  # not before the manifest says that they are not needed any more
        if not report.skipped or stage.name not in reports:
            reports[stage.name] = report
        identities[stage.name] = stage.identity(output)
        if stage.name == "collection" and stage is not stages[-1]:
            _check_sizes(context)


def _verify(context: RunContext, finished: list[Stage]) -> None:
    """Read the outputs of the finished stages through, as the next one is about to read them.

    Raises:
        _BeginAgainError: some files were not what their stage has written. They are named and removed.
    """
    damaged = False
    for stage in finished:
        output = stage.output(context.paths)
        damaged |= bool(remove_altered(output))
        for folder in stage.extra_outputs(context.paths):
            # All are written together. A killed command may have left an intact one from an earlier run of the stage.
            if content_fingerprint(folder) != content_fingerprint(output) or remove_altered(folder):
                remove_manifest(output)
                damaged = True
    if damaged:
        raise _BeginAgainError


def _work(context: RunContext, stage: Stage, fingerprint: str, finished: list[Stage]) -> StageReport:
    """Run the stage and write its manifest.

    Raises:
        _BeginAgainError: it has failed, and files of a store that it may have read are broken; they are removed.
    """
    output, started = stage.output(context.paths), time.monotonic()

    def work() -> dict[str, Any]:
        figures = stage.run(context, fingerprint)
        return {"figures": figures, "seconds": round(time.monotonic() - started, 3)}

    try:
        with Progress(stage.name):  # a stage that counts opens a progress of its own
            make(output, fingerprint, work, replace_atomically=stage.replace_atomically)
    except (UserError, LostRayError):
        raise
    except Exception as error:
        let_go(error)  # the actors of a pool that has failed hold the CPUs that the check takes
        may_be_broken = lost() is None and any(earlier.name == "embed" for earlier in finished)
        if may_be_broken and _broken_files_removed(context):
            raise _BeginAgainError from None
        raise
    figures = (manifest_of(output) or {}).get("figures", {})
    seconds = time.monotonic() - started
    say(f"{stage.name}: {_summary(figures, seconds)} -> {output}")
    return StageReport(stage.name, False, seconds, figures, output)


def _broken_files_removed(context: RunContext) -> bool:
    try:
        return remove_broken_files(context.paths) > 0
    except ray.exceptions.RayError:  # the failure was Ray's own, which the caller raises
        return False


def _done_before(context: RunContext, stage: Stage) -> StageReport:
    output = stage.output(context.paths)
    manifest = manifest_of(output) or {}
    if not context.paths.variant_name:  # a comparison would say it again for every student
        say(f"{stage.name}: done before, nothing to do ({output})")
    return StageReport(stage.name, True, manifest.get("seconds", 0.0), manifest.get("figures", {}), output)


def _check_sizes(context: RunContext) -> None:
    """Refuse now, and not after hours of training, what the size of the collection makes impossible.

    Raises:
        UserError: the corpus would be cut into too many shards.
    """
    from ckd_ray.data import Collection
    from ckd_ray.embed.stream import plan_shards

    plan_shards(Collection.open(context.paths.root).num_passages, context.config.embed.passages_per_shard)


def _summary(figures: dict[str, Any], seconds: float) -> str:
    if "count" not in figures:
        return f"done in {duration(seconds)}"
    rate = figures["count"] / max(seconds, 1e-9)
    return f"{figures['count']:,} {figures['unit']} in {duration(seconds)} ({rate:,.1f} {figures['unit']}/s)"
