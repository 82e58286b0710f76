"""The calibration: the real stages on this machine, at two sizes of a sample.

Each size is a run of its own in a temporary folder, in a process of its own, so that imports and the start of Ray take
their time as they do in a real run. After the larger run, exact search runs once more at other depths, as two sizes
alone do not tell its parts apart. Seconds and counts are those that the stages report.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckd_ray.checks import all_problems
from ckd_ray.config import Config
from ckd_ray.errors import JobError, UserError
from ckd_ray.plan.cluster import this_machine
from ckd_ray.plan.encoder import shape_of
from ckd_ray.plan.fit import Observation, fit
from ckd_ray.plan.layout import Layout, engines, lay_out
from ckd_ray.plan.rates import Rates
from ckd_ray.plan.sizes import Sample, Sizes
from ckd_ray.plan.work import FOLDERS, stage_work, storage_units
from ckd_ray.progress import duration, say

if TYPE_CHECKING:
    from ckd_ray.model import ColBERT

# Sizes of the larger run for each core or GPU: the stages of a small encoder then take some ten seconds beyond their
# start.
PASSAGES, QUERIES, EVALUATED, STEPS = 750, 1500, 150, 16
_GPU_FACTOR, _GPU_STEPS = 30, 100
# The smaller run has 1/_PART of these sizes. If it takes longer than _LONG_S, the larger run has only _CUT times its
# sizes.
_PART, _CUT, _LONG_S = 5, 2, 300.0
_ENDS_WITHIN_S = 6 * 3600.0


@dataclass(frozen=True)
class SampleSizes:
    """How much of the sample a run takes. evaluated: queries of each split that is evaluated."""

    passages: int
    queries: int
    evaluated: int
    steps: int

    def scaled(self, factor: float) -> SampleSizes:
        """`factor` times as much."""
        return SampleSizes(*(max(2, int(factor * value)) for value in vars(self).values()))


def sample_sizes(config: Config, sizes: Sizes | None = None) -> SampleSizes:
    """Sizes of the larger run: some ten seconds of work for this machine, and no more than the collection has."""
    here = this_machine()
    lanes = int(here.gpus * _GPU_FACTOR or here.cpus)
    most = SampleSizes(PASSAGES * lanes, QUERIES * lanes, EVALUATED * lanes, _GPU_STEPS if here.gpus else STEPS)
    if sizes is None:
        return most
    evaluated = min((sizes.queries.get(split, 0) for split in config.evaluate.splits), default=0)
    return SampleSizes(
        min(most.passages, sizes.passages),
        max(2, min(most.queries, sizes.queries.get("train", 0))),
        max(2, min(most.evaluated, evaluated)),
        most.steps,
    )


def calibrate(config: Config, sizes: Sizes, sample: Sample, model: ColBERT) -> Rates:
    """Run the stages at two sizes, and fit what a unit of work costs.

    Args:
        sizes: of the whole collection, with its tokens.
        sample: texts that the calibration runs on.
        model: the encoder that the configuration names.

    Raises:
        UserError: as the stages would say.
        JobError: a run of the calibration failed.
    """
    started, load, here = time.perf_counter(), os.getloadavg()[0], this_machine()
    machines = here.groups[0]
    large = sample_sizes(config, sizes)
    small = large.scaled(1 / _PART)
    with tempfile.TemporaryDirectory(prefix="ckd-ray-plan-") as folder:
        ways = engines(config, sizes)
        found = [_calibration_run(config, sizes, sample, small, Path(folder, "small"), ways)]
        if time.perf_counter() - started > _LONG_S:
            large = small.scaled(_CUT)
        found.append(_calibration_run(config, sizes, sample, large, Path(folder, "large"), ways, again=True))
    observed = [entry for run in found for entry in run.observed]
    costs = fit([Observation(entry["work"], entry["seconds"]) for entry in observed], _KNOWN)
    taken = time.perf_counter() - started
    say(f"plan: calibrated in {duration(taken)}")
    layout = found[-1].layout
    kinds = ("cores", "encode", "teacher", "distill", *layout.servers)
    return Rates(
        machine=_processor() + (f", {machines.gpus:g} {machines.accelerator}" if machines.gpus else ""),
        cores=int(machines.cpus),
        device="cuda" if machines.gpus else "cpu",
        accelerator=machines.accelerator,
        backbone=config.model.backbone,
        shape=shape_of(model),
        dim=config.model.dim,
        tokens=sizes.tokens,
        costs=costs,
        lanes={kind: layout.lanes(kind) for kind in kinds},
        storage={name: _storage(name, found) for names in FOLDERS.values() for name in names},
        seconds=round(taken, 1),
        load=round(load, 2),
        observations=tuple(observed),
    )


# Too little in a small sample to be told apart.
_KNOWN = {"step": 0.0, "bm25_token_s": 0.0, "bm25_score_s": 0.0}


@dataclass(frozen=True)
class _Run:
    """One run of the calibration: what was seen of it, its configuration, sizes and layout, and bytes by folder."""

    observed: list[dict[str, Any]]
    config: Config
    sizes: Sizes
    layout: Layout
    stored: dict[str, float]


def _calibration_run(
    config: Config,
    whole: Sizes,
    sample: Sample,
    count: SampleSizes,
    folder: Path,
    ways: tuple[str, str, str],
    *,
    again: bool = False,
) -> _Run:
    """Run the stages on a part of the sample.

    Args:
        ways: the engines and the votes that the whole collection asks for.
        again: run `retrieve` once more with other settings (`searches`).
    """
    say(f"plan: running the stages on {count.passages:,} passages, {count.queries:,} queries, {count.steps} steps")
    splits: list[str] = [split for split in config.evaluate.splits if whole.queries.get(split)]
    write_sample(folder / "source", sample, count, splits, config.collection.positive_grade)
    first = sample_config(config, folder, count, splits, ways)
    queries: dict[str, int] = {"train": count.queries, **dict.fromkeys(splits, count.evaluated)}
    sizes = replace(whole, passages=count.passages, queries=queries, labels=sum(queries.values()))
    runs = [(first, "evaluate"), *((settings, "retrieve") for settings in (searches(first) if again else ()))]
    results = _in_a_process(folder, runs)
    observed = []
    for (settings, _), result in zip(runs, results, strict=True):
        layout = lay_out(settings, sizes, this_machine())
        for report in result["stages"]:
            if not report["skipped"]:
                work = stage_work(report["stage"], settings, sizes, layout)
                observed.append({"stage": report["stage"], "work": work, "seconds": report["seconds"]})
    return _Run(observed, first, sizes, lay_out(first, sizes, this_machine()), results[0]["bytes"])


def sample_config(
    config: Config, folder: Path, count: SampleSizes, splits: list[str], ways: tuple[str, str, str]
) -> Config:
    """The configuration of a run on a part of the sample: the user's, at the sizes of the sample and with the engines
    that the whole collection asks for.

    Rankings are shorter if the sample is small compared with `retrieve.depth`. Exact search then makes its first pass
    in 8 bits here too, as in a large collection.
    """
    cores = os.cpu_count() or 1
    least = max(config.label.depths[-1], config.distill.negatives, 10)
    depth = min(config.retrieve.depth, max(least, count.passages // (8 * cores)))
    engine, _, votes = ways
    quiet = {"evaluate_every": 0, "patience": 0, "callbacks": [], "steps": count.steps}
    values = config.model_dump(mode="json")
    values["run"] |= {"name": "calibration", "storage": str(folder)}
    values["collection"] = {
        "format": "msmarco",
        "path": str(folder / "source"),
        "positive_grade": config.collection.positive_grade,
    }
    values["teacher"] |= quiet
    values["embed"] |= {"passages_per_shard": max(64, count.passages // (4 * cores))}
    values["retrieve"] |= {"engine": engine, "depth": depth}
    values["distill"] |= quiet | {"negatives_depth": min(config.distill.negatives_depth, depth)}
    if votes != "feedback":
        values["label"] |= {"neighbours": votes}
    values["cross_encoder"] |= {"depth": "auto"}
    values["evaluate"] |= {"splits": splits}
    values["compare"] = values["tune"] = values["tracking"] = {}
    if values["distill"]["objective"] == "cross_encoder" and config.cross_encoder.scores:
        # A file of scores is of the real collection; the steps take as long with scores of the teacher.
        values["distill"]["objective"], values["cross_encoder"] = "self_distillation", {}
    found = Config.model_validate(values)
    problems = list(all_problems(found))
    if problems:
        where, problem = problems[0]
        raise UserError(f"the sample of the calibration cannot be run: {problem}", where=where)
    return found


def searches(config: Config) -> list[Config]:
    """Exact search at two depths, where the run itself has not done it."""
    depths = (config.retrieve.depth, max(1, config.retrieve.depth // 8))
    found = [config.retrieve.model_copy(update={"engine": "exact", "depth": depth}) for depth in depths]
    return [config.model_copy(update={"retrieve": retrieve}) for retrieve in found if retrieve != config.retrieve]


def write_sample(folder: Path, sample: Sample, count: SampleSizes, splits: list[str], grade: float) -> None:
    """A collection in the MS MARCO layout. Query i is labelled with passage i, as time does not depend on relevance.
    Where the sample has fewer queries, they are asked again."""
    folder.mkdir(parents=True)
    texts = (f"p{i}\t{' '.join(sample.passages[i % len(sample.passages)].split())}\n" for i in range(count.passages))
    (folder / "collection.tsv").write_text("".join(texts), encoding="utf-8", errors="replace")
    first = 0
    for split, asked in {"train": count.queries, **dict.fromkeys(splits, count.evaluated)}.items():
        numbers = range(first, first + asked)
        rows = (f"q{i}\t{' '.join(sample.queries[i % len(sample.queries)].split())}\n" for i in numbers)
        (folder / f"queries.{split}.tsv").write_text("".join(rows), encoding="utf-8", errors="replace")
        labels = "".join(f"q{i}\t0\tp{i % count.passages}\t{grade}\n" for i in numbers)
        (folder / f"qrels.{split}.tsv").write_text(labels, encoding="utf-8")
        first += asked


def _in_a_process(folder: Path, runs: list[tuple[Config, str]]) -> list[dict[str, Any]]:
    """Bring these runs up, one after the other, in a process of their own; what `sample_run` found of each."""
    task, answer, log = (folder / name for name in ("task.json", "answer.json", "log"))
    asked = [{"config": config.model_dump(mode="json"), "until": until} for config, until in runs]
    task.write_text(json.dumps(asked), encoding="utf-8")
    with log.open("wb") as told:
        command = [sys.executable, "-m", "ckd_ray.plan.sample_run", str(task), str(answer)]
        options: dict[str, Any] = {"stdout": told, "stderr": told, "stdin": subprocess.DEVNULL}
        ended = f"did not end within {duration(_ENDS_WITHIN_S)}"
        with suppress(subprocess.TimeoutExpired):  # the process is killed then
            ended = f"failed (exit status {subprocess.run(command, timeout=_ENDS_WITHIN_S, **options).returncode})"
    if not answer.exists():
        lines = log.read_text(errors="replace").strip().splitlines()[-8:]
        raise JobError("a run of the calibration {}:\n  {}".format(ended, "\n  ".join(lines)))
    found = json.loads(answer.read_text(encoding="utf-8"))
    if isinstance(found, dict):
        raise UserError(**found)
    return list(found)


def _storage(folder: str, runs: list[_Run]) -> tuple[float, float]:
    """Fixed bytes of a folder, and its bytes a unit."""
    units = [(run, storage_units(folder, run.config, run.sizes)) for run in runs]
    found = fit([Observation({"fixed": 1.0, "unit": unit}, run.stored.get(folder, 0.0)) for run, unit in units])
    return found["fixed"], found["unit"]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        name = ""
    return name or platform.processor() or platform.machine()
