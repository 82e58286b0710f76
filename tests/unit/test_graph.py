"""The stage graph without Ray: which stages a command needs, what a change reaches, and what variants share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ckd_ray.compare.plan import variants
from ckd_ray.config.schema import Config
from ckd_ray.distill.objectives import OBJECTIVES
from ckd_ray.errors import UserError
from ckd_ray.files import write_json_atomic
from ckd_ray.model import sources
from ckd_ray.pipeline.baselines import baseline_fingerprint, encoder_settings
from ckd_ray.pipeline.graph import STAGE_NAMES, STAGES, check_stage_names, needed, stage_fingerprint
from ckd_ray.pipeline.stages import cross_encoder, teacher
from ckd_ray.runs.directory import RunContext

UPSTREAM = ["collection", "teacher", "embed", "retrieve"]
LABELS_OF = {"collective": ["label", "ensemble"], "cross_encoder": ["cross_encoder"]}
BEHIND_DISTILL = {"distill", "evaluate"}
BEHIND_LABEL = {"label", *BEHIND_DISTILL}
BEHIND_RETRIEVE = {"retrieve", "ensemble", "cross_encoder", *BEHIND_LABEL}
BEHIND_EMBED = {"embed", *BEHIND_RETRIEVE}
BEHIND_TEACHER = {"teacher", *BEHIND_EMBED}


@pytest.fixture(autouse=True)
def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources count by their names here: there are no files behind them."""
    for module in (teacher, cross_encoder, sources):
        monkeypatch.setattr(module, "signature", lambda source: [])
    monkeypatch.setattr(cross_encoder, "file_signature", lambda uri: (uri, 0))


def fingerprints(config: Config, source: str = "source", content: str = "content") -> dict[str, str]:
    """Of every stage, as a first run would have them; what the collection holds stands for its identity."""
    identities: dict[str, str] = {"collection": content}
    found = {}
    for stage in STAGES:
        found[stage.name] = stage_fingerprint(stage, config, identities, source)
        identities.setdefault(stage.name, found[stage.name])
    return found


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in STAGE_NAMES if before[name] != after[name]}


def config_of(*pairs: tuple[str, object], objective: str = "collective") -> Config:
    values: dict[str, dict[str, object]] = {"distill": {"objective": objective}}
    for path, value in pairs:
        section, _, key = path.partition(".")
        values.setdefault(section, {})[key] = value
    return Config.model_validate(values)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_needs_its_own_labels_and_no_others(objective: str) -> None:
    config = config_of(objective=objective)
    labels = LABELS_OF.get(objective, [])
    assert [s.name for s in needed(config, "evaluate")] == [*UPSTREAM, *labels, "distill", "evaluate"]
    assert [s.name for s in needed(config, "distill")] == [*UPSTREAM, *labels, "distill"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_until_a_stage_needs_what_it_follows_from(objective: str) -> None:
    config = config_of(objective=objective)
    expected = {name: UPSTREAM[: i + 1] for i, name in enumerate(UPSTREAM)}
    expected |= {name: [*UPSTREAM, name] for name in ("label", "ensemble", "cross_encoder")}
    for until, names in expected.items():
        assert [s.name for s in needed(config, until)] == names


def test_further_scorers_are_needed_by_the_objective_that_reads_them() -> None:
    for objective in OBJECTIVES:
        for share in (0, "auto"):
            shares = [(f"distill.{name}_share", share) for name in ("encoder", "bm25")]
            names = [stage.name for stage in needed(config_of(*shares, objective=objective), "distill")]
            assert ("ensemble" in names) == (objective == "collective" and share == "auto")


def test_every_input_comes_earlier() -> None:
    for objective in OBJECTIVES:
        config = config_of(objective=objective)
        for i, stage in enumerate(STAGES):
            assert set(stage.inputs(config)) <= set(STAGE_NAMES[:i])


def test_unknown_stages_are_refused() -> None:
    check_stage_names("embed", "evaluate")
    with pytest.raises(UserError, match="--from: unknown stage"):
        check_stage_names("embeds", "evaluate")
    with pytest.raises(UserError, match="--until: unknown stage"):
        check_stage_names(None, "training")


@pytest.mark.parametrize(
    ("path", "value", "reached"),
    [
        ("collection.limit", 7, {"collection"}),  # and what follows, where the contents differ
        ("model.dim", 64, BEHIND_TEACHER),
        ("model.dropout", 0.3, BEHIND_TEACHER),
        ("run.seed", 3, BEHIND_TEACHER),
        ("teacher.steps", 3, BEHIND_TEACHER),
        ("collection.positive_grade", 2, {"collection", *BEHIND_TEACHER}),
        ("embed.codec", "residual2", BEHIND_EMBED),
        ("retrieve.depth", 50, BEHIND_RETRIEVE),
        ("label.clusters", 12, BEHIND_LABEL),
        ("label.voters", 3, BEHIND_LABEL),
        ("distill.temperature", 0.5, BEHIND_DISTILL),
        ("distill.beta", 0.5, BEHIND_DISTILL),
        ("distill.seed", 3, BEHIND_DISTILL),
        ("distill.objective", "contrastive", BEHIND_DISTILL),
        ("distill.negatives_depth", 50, {"ensemble", "cross_encoder", *BEHIND_DISTILL}),
        ("distill.bm25_share", 0.2, BEHIND_DISTILL),
        ("distill.bm25_share", 0, {"ensemble", *BEHIND_DISTILL}),
        ("cross_encoder.maxlen", 48, {"cross_encoder"}),  # no input of this objective's student
        ("evaluate.depth", 50, {"evaluate"}),
        ("evaluate.measures", ["R@5"], {"evaluate"}),
        # Where, how fast and how safely.
        ("run.name", "other", set()),
        ("embed.actors", 1, set()),
        ("teacher.workers", 2, set()),
        ("distill.workers", 2, set()),
        ("distill.log_every", 7, set()),
    ],
)
def test_a_change_reaches_the_stages_that_follow_from_it_and_no_others(
    path: str, value: object, reached: set[str]
) -> None:
    assert changed(fingerprints(config_of()), fingerprints(config_of((path, value)))) == reached


def test_the_contents_of_a_collection_count_and_not_where_they_were_read() -> None:
    config = config_of()
    assert changed(fingerprints(config), fingerprints(config, source="elsewhere")) == {"collection"}
    assert changed(fingerprints(config), fingerprints(config, content="other")) == BEHIND_TEACHER


def test_a_student_from_a_cross_encoder_follows_from_its_scores() -> None:
    before = fingerprints(config_of(("cross_encoder.model", "one"), objective="cross_encoder"))
    after = fingerprints(config_of(("cross_encoder.model", "two"), objective="cross_encoder"))
    assert changed(before, after) == {"cross_encoder", *BEHIND_DISTILL}


def test_a_teacher_with_other_weights_is_followed() -> None:
    """Identities count, and not only settings: on a GPU the same settings can give other weights."""
    config = config_of()
    for stage in STAGES:
        inputs = dict.fromkeys(stage.inputs(config), "same")
        others = inputs | ({"teacher": "other"} if "teacher" in inputs else {})
        one, two = (stage_fingerprint(stage, config, identities, "") for identities in (inputs, others))
        assert (one != two) == (stage.name in ("embed", "distill")), stage.name


def test_variants_share_everything_before_their_student() -> None:
    config = config_of(("compare.seeds", [3, 4]))
    own = fingerprints(config)
    planned = variants(config)
    assert len({fingerprints(v.config)["distill"] for v in planned}) == len(planned)
    shared, base = set(STAGE_NAMES) - BEHIND_DISTILL, RunContext.of(config).paths
    for variant in planned:
        assert changed(own, fingerprints(variant.config)) <= BEHIND_DISTILL
        paths = RunContext.of(variant.config, variant.folder).paths
        for stage in STAGES:
            assert (stage.output(paths) == stage.output(base)) == (stage.name in shared), stage.name
            assert stage.output(paths).startswith(base.root + "/")


def test_baselines_are_not_measured_again_for_another_student(tmp_path: Path) -> None:
    def both(*pairs: tuple[str, object]) -> tuple[str, str]:
        place = [("run.storage", str(tmp_path)), ("run.name", "r")]
        context = RunContext.of(config_of(*place, *pairs))
        encoder = encoder_settings(context.config)
        return baseline_fingerprint(context, ["dev"], baseline="encoder", **encoder), baseline_fingerprint(
            context, ["dev"], baseline="bm25"
        )

    own = both()
    for path, value in (("distill.temperature", 0.5), ("teacher.steps", 3), ("label.clusters", 12), ("model.dim", 64)):
        assert both((path, value)) == own, path
    for path, value in (("evaluate.depth", 50), ("evaluate.measures", ["R@5"]), ("evaluate.skip_same_id", True)):
        assert all(a != b for a, b in zip(both((path, value)), own, strict=True)), path
    changed_encoder = both(("model.backbone", "other"))
    assert changed_encoder[0] != own[0] and changed_encoder[1] == own[1]
    write_json_atomic(str(tmp_path / "r/corpus/_manifest.json"), {"fingerprint": "other"})
    assert all(a != b for a, b in zip(both(), own, strict=True))


def test_the_graph_needs_no_ray() -> None:
    """A command that only looks at it, or refuses its arguments, starts fast."""
    code = "import sys, ckd_ray.pipeline.graph; sys.exit('ray' in sys.modules or 'transformers' in sys.modules)"
    root = str(Path(__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
