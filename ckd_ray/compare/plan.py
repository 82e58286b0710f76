"""The students of a comparison: one for each objective and seed, each a variant of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from ckd_ray.config.schema import Config, DistillConfig
from ckd_ray.distill.objectives import BASELINE, CONDITIONAL_KEYS, OBJECTIVES
from ckd_ray.runs.directory import COMPARE

# The keys that `compare.settings` may change for one objective: those of its loss. The others are the budget, which all
# objectives share, or change no result.
SETTINGS = frozenset({*CONDITIONAL_KEYS, "learning_rate", "score_scale", "zero_row_floor"} - {"teacher_embeddings"})


@dataclass(frozen=True)
class Variant:
    """One student."""

    objective: str
    seed: int
    config: Config

    @property
    def folder(self) -> str:
        """Where the variant's own artifacts are."""
        return f"{COMPARE}/{self.objective}-{self.seed}"


def objectives(config: Config) -> list[str]:
    """The objectives to compare, `contrastive` first because the others are tested against it. Without a list, all that
    the configuration allows."""
    chosen: Sequence[str] | None = config.compare.objectives
    if chosen is None:
        chosen = [name for name in OBJECTIVES if not list(_mistakes(config, name))]
    return [BASELINE.name, *(name for name in dict.fromkeys(chosen) if name != BASELINE.name)]


def _mistakes(config: Config, objective: str) -> Iterator[tuple[str, str]]:
    """The problems of one student's configuration."""
    try:
        settings = settings_of(config, objective)
    except ValidationError:
        return  # `compare_problems` reports it
    yield from OBJECTIVES[objective].mistakes(config.model_copy(update={"distill": settings}))


def variants(config: Config) -> list[Variant]:
    """All students, seed by seed, so that an interrupted comparison has complete seeds.

    They share the run's teacher, embeddings, rankings and labels: `distill.seed` varies the distillation only.
    """
    seeds = list(dict.fromkeys(config.compare.seeds))
    return [
        Variant(name, seed, config.model_copy(update={"distill": settings_of(config, name, seed)}))
        for seed in seeds
        for name in objectives(config)
    ]


def settings_of(config: Config, objective: str, seed: int | None = None) -> DistillConfig:
    """Section `distill` for an objective: the configured one, what the objective changes in it, and `compare.settings`.

    Raises:
        pydantic.ValidationError: a value of `compare.settings` is wrong.
    """
    values = config.distill.model_dump()
    values |= {"objective": objective, "seed": seed if seed is not None else config.distill.seed}
    values |= OBJECTIVES[objective].in_comparison(config)
    return DistillConfig.model_validate({**values, **config.compare.settings.get(objective, {})})  # type: ignore[call-overload]


def compare_problems(config: Config) -> list[tuple[str, str]]:
    """The problems of section `compare`: (path, sentence)."""
    found = []
    for name, changes in config.compare.settings.items():
        path = f"compare.settings.{name}"
        for key in changes:
            if key not in SETTINGS:
                found.append((f"{path}.{key}", f"cannot differ between objectives; {', '.join(sorted(SETTINGS))} can"))
        if not set(changes) <= SETTINGS:
            continue
        try:
            settings = settings_of(config, name)
        except ValidationError as error:
            for item in error.errors():
                where = ".".join(str(part) for part in item["loc"])
                found.append((f"{path}.{where}", f"{item['msg'][:1].lower()}{item['msg'][1:]}"))
            continue
        if settings.expansion_size > config.label.clusters:
            found.append((f"{path}.expansion_size", f"must be at most label.clusters ({config.label.clusters})"))
    chosen = config.compare.objectives or []
    for name in dict.fromkeys([*chosen, *config.compare.settings]):
        for path, message in _mistakes(config, name):
            key = path.removeprefix("distill.")
            if key in config.compare.settings.get(name, {}):
                found.append((f"compare.settings.{name}.{key}", message))
            elif name in chosen:
                found.append((f"compare.objectives[{chosen.index(name)}]", f"{path}: {message}"))
    return found
