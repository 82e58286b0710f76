"""Every key of the configuration either changes what some stage is made of, or is marked as operational.

A key that is neither would leave an old artifact behind that is reported as done.
"""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import pytest

from ckd_ray.collective.losses import BatchScores
from ckd_ray.config.schema import Config, DistillConfig, Section
from ckd_ray.distill.objectives import CONDITIONAL_KEYS, LOSS_KEYS, OBJECTIVES
from ckd_ray.model import sources
from ckd_ray.pipeline.graph import STAGES
from ckd_ray.pipeline.stages import cross_encoder, teacher

# Configurations that between them read every key.
BASES: list[dict[str, dict[str, Any]]] = [
    *({"distill": {"objective": name, "loss": loss}} for name in OBJECTIVES for loss in LOSS_KEYS),
    {"distill": {"beta": 0.5, "evaluate_every": 5, "seed": None}, "teacher": {"evaluate_every": 5}},
    {"retrieve": {"engine": "faiss"}, "label": {"neighbours": "faiss"}, "embed": {"codec": "residual2"}},
    {"teacher": {"checkpoint": "somewhere"}, "label": {"token_vote": "feedback"}},
    {"cross_encoder": {"model": "somewhere"}},
]
# Values where the key's type does not suggest another one.
OTHERS: dict[str, Any] = {
    "run.name": "other",
    "run.storage": "elsewhere",
    "collection.path": "elsewhere",
    "collection.passages": "elsewhere",
    "collection.queries": {"train": "elsewhere"},
    "collection.qrels": {"train": "elsewhere"},
    "collection.packages": ["pip"],
    "collection.limit": 7,
    "model.backbone": "elsewhere",
    "teacher.checkpoint": "elsewhere",
    "cross_encoder.scores": "elsewhere",
    "cross_encoder.model": "elsewhere",
    "distill.seed": 3,
    "distill.denoise": 0.5,
}


def keys() -> list[tuple[str, str]]:
    """(section, key) of every key that a stage may read; `compare` and `tune` belong to their commands."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    inside = [name for name in sections if name not in Config.operational_keys()]
    return [(name, key) for name in inside for key in sections[name].model_fields]


def another(section: Section, path: str, key: str) -> Any:
    """A value that differs from the configured one."""
    if path in OTHERS:
        return OTHERS[path]
    value, kind = getattr(section, key), type(section).model_fields[key].annotation
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return value[1:] or ["other"]
    choices = [c for part in (kind, *get_args(kind)) if get_origin(part) is Literal for c in get_args(part)]
    if value == "auto" and choices == ["auto"]:
        return 2
    return next((choice for choice in choices if choice != value), "other")


def settings(config: Config) -> dict[str, Any]:
    return {stage.name: (stage.fingerprint_settings(config), stage.inputs(config)) for stage in STAGES}


@pytest.fixture(autouse=True)
def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources count by their names here: there are no files behind them."""
    for module in (teacher, cross_encoder, sources):
        monkeypatch.setattr(module, "signature", lambda source: [])
    monkeypatch.setattr(cross_encoder, "file_signature", lambda uri: (uri, 0))


@pytest.mark.parametrize(("section", "key"), keys())
def test_a_key_counts_in_a_fingerprint_or_is_operational(section: str, key: str) -> None:
    path, counted = f"{section}.{key}", []
    for base in BASES:
        config = Config.model_validate(base)
        part = getattr(config, section)
        changed = part.model_copy(update={key: another(part, path, key)})
        counted.append(settings(config) != settings(config.model_copy(update={section: changed})))
    if key in type(getattr(Config(), section)).operational_keys():
        assert not any(counted), f"{path} is marked operational, and counts in a fingerprint"
    else:
        assert any(counted), f"{path} counts in no fingerprint: mark it OPERATIONAL, or let a stage read it"


def test_trackers_are_in_no_fingerprint() -> None:
    other = Config.model_validate({"tracking": {"to": ["tensorboard", "mlflow"], "project": "other"}})
    assert other != Config() and settings(other) == settings(Config())


def test_a_list_of_one_depth_has_the_fingerprint_of_the_number() -> None:
    three, listed, several = (Config.model_validate({"label": {"feedback_passages": v}}) for v in (3, [3], [1, 3]))
    assert listed == three == Config() and settings(listed) == settings(Config())
    assert listed.model_dump_json() == three.model_dump_json()
    assert settings(several)["label"] != settings(three)["label"]
    assert Config.model_validate(several.model_dump(mode="json")) == several
    assert (three.label.depths, several.label.depths) == ((3,), (1, 3))


def test_keys_that_an_objective_does_not_read_change_nothing() -> None:
    for name, objective in OBJECTIVES.items():
        for loss in LOSS_KEYS:
            config = Config.model_validate({"distill": {"objective": name, "loss": loss}})
            read = objective.keys(config.distill)
            for key in CONDITIONAL_KEYS:
                value = another(config.distill, f"distill.{key}", key)
                changed = config.distill.model_copy(update={key: value})
                same = settings(config) == settings(config.model_copy(update={"distill": changed}))
                assert same == (key not in read), (name, loss, key)


def test_objectives_and_losses_are_those_of_the_schema() -> None:
    fields = DistillConfig.model_fields
    assert set(get_args(fields["objective"].annotation)) == set(OBJECTIVES)
    assert set(get_args(fields["loss"].annotation)) == set(LOSS_KEYS)
    assert set(DistillConfig.model_fields) >= CONDITIONAL_KEYS


def test_an_objective_reads_no_conditional_key_that_it_does_not_declare() -> None:
    """The loss is computed with settings that raise for every other conditional key."""
    import torch

    class Watched:
        def __init__(self, section: DistillConfig, allowed: frozenset[str]) -> None:
            self._section, self._allowed = section, allowed

        def __getattr__(self, key: str) -> Any:
            assert key not in CONDITIONAL_KEYS or key in self._allowed, f"{key} is read but not declared"
            return getattr(self._section, key)

    torch.manual_seed(0)
    student, teacher = torch.randn(3, 12), torch.randn(3, 12)
    scores = BatchScores(student, torch.tensor([0, 4, 8]), torch.ones(3, 12, dtype=torch.bool), 4, teacher)
    for name, objective in OBJECTIVES.items():
        for loss in LOSS_KEYS:
            section = DistillConfig(objective=name, loss=loss)
            watched: Any = Watched(section, objective.keys(section))
            assert torch.isfinite(objective.loss(scores, watched, 2.0).loss_B).all()
