"""Which students a comparison trains: one for each objective and seed, each a variant of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ckd_ray.config.schema import Config, DistillConfig

# What `compare.settings` may change for one objective. The rest is the budget, which all share, or says where and how
# fast.
SETTINGS = frozenset({"temperature", "smoothing", "beta", "expansion_size", "learning_rate", "zero_row_floor"})


@dataclass(frozen=True)
class Variant:
    """One student. `folder` is below the run: `compare/OBJECTIVE-SEED`."""

    objective: str
    seed: int
    config: Config

    @property
    def folder(self) -> str:
        """Where the variant's own artefacts are."""
        return f"compare/{self.objective}-{self.seed}"


def objectives(config: Config) -> list[str]:
    """The objectives to compare, `contrastive` first: the others are tested against it."""
    chosen = config.compare.objectives
    if chosen is None:
        source: Any = getattr(config, "cross_encoder", None)
        configured = source is not None and bool(source.scores or source.model)
        wanted = ["label_smoothing", "self_distillation", *(["cross_encoder"] if configured else []), "collective"]
    else:
        wanted = [name for name in dict.fromkeys(chosen) if name != "contrastive"]
    return ["contrastive", *wanted]


def variants(config: Config) -> list[Variant]:
    """All students, seed by seed, so that a comparison that is stopped early has whole seeds.

    The run's teacher, embeddings, rankings and labels serve all of them: `distill.seed` varies the distillation alone.
    """
    seeds = list(dict.fromkeys(config.compare.seeds))
    return [
        Variant(name, seed, config.model_copy(update={"distill": settings_of(config, name, seed)}))
        for seed in seeds
        for name in objectives(config)
    ]


def settings_of(config: Config, objective: str, seed: int | None = None) -> DistillConfig:
    """Section `distill` for an objective: the configured one, its smoothing as that objective takes it, and
    `compare.settings`.

    Raises:
        pydantic.ValidationError: a value of `compare.settings` is wrong.
    """
    values = config.distill.model_dump()
    values |= {"objective": objective, "seed": seed if seed is not None else config.distill.seed}
    if objective == "contrastive":
        values["smoothing"] = 0.0
    elif objective == "label_smoothing":
        values["smoothing"] = config.distill.smoothing or config.compare.smoothing
    return DistillConfig.model_validate({**values, **config.compare.settings.get(objective, {})})  # type: ignore[call-overload]


def problems(config: Config) -> list[tuple[str, str]]:
    """What is wrong with `compare.settings`: (path, sentence)."""
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
        if name == "label_smoothing" and settings.smoothing == 0:
            found.append((f"{path}.smoothing", "must be above 0: without it label_smoothing is contrastive"))
        if settings.expansion_size > config.label.clusters:
            found.append((f"{path}.expansion_size", f"must be at most label.clusters ({config.label.clusters})"))
    return found
