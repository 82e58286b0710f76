"""`ckd-ray train --generations N`: the student of one generation is the teacher of the next.

The first generation is the run itself. Generation g of the later ones is a run of its own in `generation-g` inside of
it, whose teacher is the student before it, so `report`, `search`, `inspect` and `export` open it like any run. Called
again, it goes on where it stopped: every generation is resumed by its own manifests. A new student of an earlier
generation is another teacher, so what follows from it is done again.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckd_ray.config import Config
from ckd_ray.files import copy_folder, exists
from ckd_ray.pipeline.runner import StageReport, run_stages
from ckd_ray.progress import say
from ckd_ray.runs.directory import RunContext

# What does not depend on the teacher: copied from generation to generation rather than made again.
_SHARED = ("corpus", "queries", "baselines")


def generation_folder(number: int) -> str:
    """The folder of a generation, below the run; the first is the run itself."""
    return f"generation-{number}"


def run_generations(config: Config, count: int, *, fresh: bool = False) -> Iterator[tuple[Config, list[StageReport]]]:
    """Bring `count` generations up to their evaluation, one after the other. Ray must be connected.

    Args:
        fresh: remove what all of them have made first.

    Yields:
        The configuration and the stages of each generation, once it is finished.
    """
    first = RunContext.of(config)
    for number in range(1, count + 1):
        if number > 1:
            say(f"generation {number} of {count}: the student of generation {number - 1} is the teacher")
            config = _next(config, first, number)
        reports = run_stages(config, fresh=fresh)
        yield config, reports


def _next(config: Config, first: RunContext, number: int) -> Config:
    """The configuration of generation `number`, given that of the one before it, whose shared folders are copied."""
    before = RunContext.of(config)
    teacher = config.teacher.model_copy(update={"checkpoint": before.path("student")})
    place = config.run.model_copy(update={"storage": first.run, "name": generation_folder(number)})
    following = config.model_copy(update={"teacher": teacher, "run": place})
    for folder in _SHARED:
        target = RunContext.of(following).path(folder)
        if exists(before.path(folder)) and not exists(target):
            copy_folder(before.path(folder), target)
    return following
