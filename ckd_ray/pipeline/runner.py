"""Runs the stages that are not done yet, and tells people what happened."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Any

from ckd_ray import __version__
from ckd_ray.config import Config
from ckd_ray.distill.task import checkpoints_of
from ckd_ray.errors import LostRayError, UserError
from ckd_ray.files import delete, write_json_atomic
from ckd_ray.pipeline.stages import BESIDE, Stage, check_stage_names, made_of, needed
from ckd_ray.progress import duration, say, without_secrets
from ckd_ray.runs.artifact import MANIFEST, identity_of, is_made, make, manifest_of, remove_altered
from ckd_ray.runs.directory import RunContext
from ckd_ray.runs.lock import run_lock


@dataclass(frozen=True)
class StageReport:
    """What a stage did: `skipped` when it was done before; seconds and figures are those of the run that did it."""

    name: str
    skipped: bool
    seconds: float
    figures: dict[str, Any]
    where: str


def run_stages(
    config: Config,
    *,
    until: str = "evaluate",
    start: str | None = None,
    fresh: bool = False,
    variant: str | None = None,
    labels: str = "labels",
) -> list[StageReport]:
    """Bring the run up to `until`. Ray must be connected.

    Args:
        start: this stage and all that follow are done again even if they are there.
        fresh: remove the whole run first.
        variant, labels: folders below the run for this student and these labels (see `RunContext`).

    Raises:
        UserError: a stage name is unknown, or another process holds the run.
    """
    check_stage_names(start, until)
    from ckd_ray.data import source_signature

    context = RunContext.of(config, variant, labels)
    source = source_signature(config.collection)
    with run_lock(context.run):
        stages = needed(config, until)
        names = [stage.name for stage in stages]
        if fresh:
            for folder in (*(stage.folder for stage in stages), *BESIDE):
                delete(context.path(folder))
        if variant or labels == "labels":  # run.json tells of the run's own settings
            _record(context)
        again = {stage.name for stage in stages[names.index(start) :]} if start in names else set()
        worked: dict[str, StageReport] = {}
        while (reports := _brought_up(context, stages, source, again, worked)) is None:
            pass
        return [worked.get(report.name, report) for report in reports]


def _brought_up(
    context: RunContext, stages: list[Stage], source: str, again: set[str], worked: dict[str, StageReport]
) -> list[StageReport] | None:
    """One pass over the stages; None when another one has to begin anew: files of a store were broken, or what was made
    again came out differently (see `artefact.identity_of`).

    Args:
        again: names of stages that are done again even if they are there; each is struck out once that has begun.
        worked: gets the reports of stages that were not just skipped, in this pass or one before it.
    """
    prints: dict[str, str] = {}  # of each stage: of what it is made
    done: dict[str, str] = {}  # of each stage: on what those after it depend
    reports: list[StageReport] = []
    try:
        for stage in stages:
            print_of = prints[stage.name] = made_of(stage, context.config, done, source)
            if stage.name in again:
                again.remove(stage.name)
                delete(context.path(stage.folder))
                delete(_checkpoints(context, stage, print_of))
            try:
                if not is_made(context.path(stage.folder), print_of):
                    _read_through(context, stages, reports, prints)
                    if done != {earlier.name: _identity(context, earlier) for earlier in stages[: len(reports)]}:
                        return None
                reports.append(_run(context, stage, print_of))
            except (UserError, LostRayError):
                raise
            except Exception:
                if not _repaired(context, stages, reports, prints):
                    raise
                return None  # what was to be read before this stage may not have been looked at to the end
            done[stage.name] = _identity(context, stage)
            if stage.name == "collection" and stage is not stages[-1]:
                _check_sizes(context)
    finally:
        worked |= {report.name: report for report in reports if not report.skipped}
    return reports


def _check_sizes(context: RunContext) -> None:
    """What the size of the collection makes impossible is refused here, not after hours of training.

    Raises:
        UserError: the corpus would be cut into too many shards.
    """
    from ckd_ray.data import Collection
    from ckd_ray.embed.stream import plan_shards

    plan_shards(Collection.open(context.run).num_passages, context.config.embed.passages_per_shard)


def _read_through(context: RunContext, stages: list[Stage], reports: list[StageReport], prints: dict[str, str]) -> None:
    """Before a stage works: what those before it have finished is what was written, or is made again."""
    for i, earlier in enumerate(stages[: len(reports)]):
        altered = remove_altered(context.path(earlier.folder))
        for folder in earlier.beside:
            mine, its = manifest_of(context.path(earlier.folder)) or {}, manifest_of(context.path(folder)) or {}
            if mine.get("fingerprint") != its.get("fingerprint") or remove_altered(context.path(folder)):
                # They are written together; a killed command may have left one of another time, whole in itself.
                delete(context.path(earlier.folder, MANIFEST))
                altered = [folder]
        if altered:
            reports[i] = _run(context, earlier, prints[earlier.name])


def _repaired(context: RunContext, stages: list[Stage], reports: list[StageReport], prints: dict[str, str]) -> bool:
    """After a failure, look for broken files of a store and make these again. Returns whether there were any."""
    import ray

    from ckd_ray.pipeline.repair import remove_broken_files

    if "embed" not in {report.name for report in reports}:
        return False
    try:
        if not remove_broken_files(context):
            return False
    except ray.exceptions.RayError:  # the failure was Ray's own, and nothing can be looked at; it is what is told
        return False
    embed = next(stage for stage in stages if stage.name == "embed")
    at = next(i for i, report in enumerate(reports) if report.name == "embed")
    reports[at] = _run(context, embed, prints["embed"])
    return True


def _run(context: RunContext, stage: Stage, print_of: str) -> StageReport:
    folder = context.path(stage.folder)
    started = time.monotonic()
    if is_made(folder, print_of):
        manifest = manifest_of(folder) or {}
        delete(_checkpoints(context, stage, print_of))  # of a command that was killed before it came to that
        if context.variant is None:  # a comparison would say it again for every student
            say(f"{stage.name}: done before, nothing to do ({folder})")
        return StageReport(stage.name, True, manifest.get("seconds", 0.0), manifest.get("figures", {}), folder)
    say(f"{stage.name}: starting")

    def work() -> dict[str, Any]:
        figures = stage.work(context, print_of)
        return {"figures": figures, "seconds": round(time.monotonic() - started, 3)}

    make(folder, print_of, work, whole=stage.whole)
    delete(_checkpoints(context, stage, print_of))  # not before the manifest says that they are needed no more
    figures = (manifest_of(folder) or {}).get("figures", {})
    seconds = time.monotonic() - started
    say(f"{stage.name}: {_what(figures, seconds)} -> {folder}")
    return StageReport(stage.name, False, seconds, figures, folder)


def _checkpoints(context: RunContext, stage: Stage, print_of: str) -> str:
    return context.path(checkpoints_of(stage.name, print_of))


def _what(figures: dict[str, Any], seconds: float) -> str:
    if "count" not in figures:
        return f"done in {duration(seconds)}"
    rate = figures["count"] / max(seconds, 1e-9)
    return f"{figures['count']:,} {figures['unit']} in {duration(seconds)} ({rate:,.1f} {figures['unit']}/s)"


def _identity(context: RunContext, stage: Stage) -> str:
    """What later stages depend on: the content for the collection (wherever it was read from), else how it was made
    and the weights that came of it."""
    if stage.name != "collection":
        return identity_of(context.path(stage.folder))
    return str((manifest_of(context.path("corpus")) or {})["fingerprint"])


def _cluster() -> dict[str, Any]:
    import ray

    if not ray.is_initialized():
        return {}
    have = ray.cluster_resources()
    return {"nodes": sum(n["Alive"] for n in ray.nodes()), "ray_cpus": have.get("CPU", 0), "gpus": have.get("GPU", 0)}


def _record(context: RunContext) -> None:
    """`run.json`: the configuration and the versions, for whoever opens the run later."""
    import platform
    from importlib.metadata import version

    names = ("ray", "torch", "transformers", "pyarrow", "faiss-cpu", "numpy")
    record = {
        "ckd_ray": __version__,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), **_cluster()},
        **({"variant": context.variant} if context.variant else {}),
        "config": context.config.model_dump(mode="json"),
    }
    # Keys that stand in a URI are not kept: a run directory is passed on.
    write_json_atomic(context.path("run.json"), json.loads(without_secrets(json.dumps(record))))
