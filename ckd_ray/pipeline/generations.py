"""`ckd-ray train --generations N`: the student of one generation is the teacher of the next.

The first generation is the run itself. Each later generation g is a run of its own in `generation-g` inside the
first, and the student of generation g-1 is its teacher, so `report`, `search`, `inspect` and `export` open it like any
run. The same command resumes where it stopped, since every generation has manifests of its own. When an earlier
generation gets a new student, what follows from that one is done again.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckd_ray.config import Config
from ckd_ray.files import copy_folder, exists
from ckd_ray.pipeline.runner import StageReport, run_stages
from ckd_ray.progress import say
from ckd_ray.runs.directory import RunContext, RunDir


def run_generations(config: Config, count: int, *, fresh: bool = False) -> Iterator[tuple[Config, list[StageReport]]]:
    """Bring `count` generations up to their evaluation, one after the other. Ray must be connected.

    Args:
        fresh: remove all generations first.

    Yields:
        The configuration and the stages of each generation, once it is finished.
    """
    first = RunContext.of(config).paths
    for number in range(1, count + 1):
        if number > 1:
            say(f"generation {number} of {count}: the student of generation {number - 1} is the teacher")
            config = _next(config, first, number)
        reports = run_stages(config, fresh=fresh)
        yield config, reports


def _next(config: Config, first: RunDir, number: int) -> Config:
    """The configuration of generation `number`, given that of the one before it, whose shared folders are copied."""
    before = RunContext.of(config).paths
    teacher = config.teacher.model_copy(update={"checkpoint": before.student})
    place = config.run.model_copy(update={"storage": first.root, "name": f"generation-{number}"})
    following = config.model_copy(update={"teacher": teacher, "run": place})
    run = RunContext.of(following).paths
    # What does not depend on the teacher is copied rather than made again.
    for source, target in (
        (before.corpus, run.corpus),
        (before.queries, run.queries),
        (before.baselines, run.baselines),
    ):
        if exists(source) and not exists(target):
            copy_folder(source, target)
    return following
