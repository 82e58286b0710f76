"""The configuration: defaults of the contract, overrides, and every mistake at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ckd_ray.checks import load_config
from ckd_ray.config import Config, ConfigError
from ckd_ray.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_example_is_valid(path: Path) -> None:
    assert load_config(str(path)).run.name == path.stem


def test_no_file_reads_the_embedded_quick_start() -> None:
    assert load_config(None) == load_config(str(CONFIGS[0].with_name("quickstart.yaml")))


def test_another_collection_on_the_embedded_default_is_not_cut_to_its_size() -> None:
    mine = ["collection.format=msmarco", "collection.path=/data"]
    assert load_config(None).collection.limit == 1600 and load_config(None).retrieve.engine == "exact"
    assert load_config(None, mine).collection.limit is None and load_config(None, mine).retrieve.engine == "auto"
    assert load_config(None, mine).distill == Config().distill and load_config(None, mine).teacher == Config().teacher
    assert load_config(None, [*mine, "collection.limit=7"]).collection.limit == 7


def test_defaults_of_the_contract(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    c = load_config(str(tmp_path / "empty.yaml"))
    assert (c.run.name, c.run.storage, c.run.seed) == ("quickstart", "runs", 17)
    assert (c.collection.train, c.collection.dev, c.collection.test, c.collection.limit) == (
        "train",
        "dev",
        "test",
        None,
    )
    m = c.model
    assert (m.dim, m.query_maxlen, m.doc_maxlen, m.mask_punctuation, m.similarity) == (128, 32, 180, True, "l2")
    assert (c.teacher.checkpoint, c.teacher.batch_size, c.teacher.learning_rate) == (None, 16, 1e-4)
    r = c.retrieve
    assert (r.engine, r.cells, r.nprobe, r.candidates, r.depth) == ("auto", "auto", 32, 1024, 100)
    assert c.label.model_dump() == {
        "feedback_passages": 3,
        "clusters": 24,
        "voters": 10,
        "token_vote": "collection",
        "neighbours": "auto",
    }
    d = c.distill
    assert (d.objective, d.loss, d.temperature, d.score_scale) == ("collective", "decoupled", "auto", "auto")
    assert (d.smoothing, d.beta, d.expansion_share, d.expansion_size) == (0.0, "auto", 0.3, 10)
    assert (d.negatives, d.sampling, d.negatives_depth) == (7, "strata", 100)
    assert (d.batch_size, d.learning_rate) == (4, 3e-5)
    assert c.evaluate.measures == ["MRR@10", "nDCG@10", "R@100", "R@1000"]
    assert (c.evaluate.depth, c.evaluate.relevance_threshold) == (1000, 1)


def test_overrides_are_yaml_and_the_last_wins() -> None:
    c = load_config(
        None,
        ["distill.temperature=0.5", "distill.temperature=3e-1", "evaluate.measures=[P@5]", "collection.limit=null"],
    )
    assert c.distill.temperature == 0.3
    assert c.evaluate.measures == ["P@5"]
    assert c.collection.limit is None


def problems(*overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_config(None, list(overrides))
    for problem in caught.value.problems:
        assert problem.path in str(caught.value) and problem.message in str(caught.value)
    return {p.path: p.message for p in caught.value.problems}


def test_all_problems_at_once() -> None:
    """An unknown key, a wrong type, a wrong choice and an impossible combination in one message."""
    found = problems(
        "distill.temperatur=0.3",
        "label.clusters=many",
        "embed.actors=0",
        "retrieve.engine=fais",
        "distill.expansion_size=30",
    )
    assert found == {
        "distill.temperatur": "unknown key; did you mean distill.temperature?",
        "label.clusters": "expected an integer, found 'many'",
        "embed.actors": "expected auto or a number in range (above 0), found 0",
        "retrieve.engine": "expected 'auto', 'exact', 'centroids' or 'faiss', found 'fais'",
        "distill.expansion_size": "must be at most label.clusters (24)",
    }


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("temperature=1", "temperature", "did you mean distill.temperature?"),
        ("retreive.depth=3", "retreive.depth", "did you mean retrieve.depth?"),
        ("retreive=3", "retreive", "did you mean retrieve?"),
        ("distill.depth=5", "distill.depth", "did you mean retrieve.depth?"),
        ("Distill.Learning-Rate=1", "Distill.Learning-Rate", "did you mean distill.learning_rate?"),
        ("label.clusters=true", "label.clusters", "true and false are for switches"),
        ("distill.beta=yes", "distill.beta", "true and false are for switches"),
        ("teacher.clip_norm=.inf", "teacher.clip_norm", "finite number"),
        ("distill.temperature=.nan", "distill.temperature", "a number in range (above 0 to 100)"),
        ("distill.loss=klt", "distill.loss", "'kl', 'margin', 'mixture' or 'decoupled'"),
        ("distill.negatives=1", "distill.negatives", "loss decoupled orders a query's own candidates"),
        ("distill={objective: contrastive, smoothing: 0.1}", "distill.smoothing", "take label_smoothing"),
        ("distill.steps=99999999999", "distill.steps", "less than 2147483648"),
        ("run.name=..", "run.name", "match pattern"),
        ("run.name=2024", "run.name", "put it in quotes"),
        ("collection.train=", "collection.train", "a string"),
        ("collection.packages=[]", "collection.packages", "at least 1 item"),
        ("collection.queries={validation: a}", "collection.queries.validation", "'train', 'dev' or 'test'"),
        ("evaluate.splits=[dev,dev]", "evaluate.splits[1]", "listed twice"),
        ("evaluate.measures=[MRR@10,RR@10]", "evaluate.measures[1]", "listed twice"),
        ("evaluate.measures=[R]", "evaluate.measures[0]", "needs a cutoff"),
        ("evaluate.measures=[MRR@0]", "evaluate.measures[0]", "needs a cutoff"),
        ("evaluate.measures=[R@1e3]", "evaluate.measures[0]", "needs a cutoff"),
        ("evaluate.measures=[R@2000]", "evaluate.measures[0]", "deeper than evaluate.depth (100)"),
        ("evaluate.measures=[P@3.5]", "evaluate.measures[0]", "needs a cutoff"),
        ("run={seed: 1, seed: 2}", "run.seed", "is given twice, in lines 1 and 1"),
        ("distill.steps=" + "9" * 5000, "distill.steps", "not valid YAML"),
        ("evaluate.measures=" + "[" * 5000, "evaluate.measures", "nested too deeply"),
        ("teacher=3", "teacher", "expected a section of keys, found 3"),
        ("distill.temperature=0", "distill.temperature", "in range (above 0 to 100), found 0"),
        ("distill.smoothing=1", "distill.smoothing", "less than 1"),
        ("run.name=a/b", "run.name", "match pattern"),
        ("collection.format=beir", "collection.path", "needs a folder"),
        ("collection.path=x", "collection.path", "no meaning for format docstrings"),
        ("distill.negatives_depth=101", "distill.negatives_depth", "at most retrieve.depth (100)"),
        ("retrieve.depth=2", "retrieve.depth", "at least label.feedback_passages (3)"),
        ("label.feedback_passages=[1,101]", "retrieve.depth", "at least label.feedback_passages (101)"),
        ("label.feedback_passages=0", "label.feedback_passages", "greater than 0, found 0"),
        ("label.feedback_passages=many", "label.feedback_passages", "an integer"),
        ("label.feedback_passages=[]", "label.feedback_passages", "at least 1 item"),
        ("label.feedback_passages=[1,2,3,4,5,6,7,8,9]", "label.feedback_passages", "at most 8 items"),
        ("label.feedback_passages=[3,1]", "label.feedback_passages", "ascending numbers, each of them once"),
        ("label.feedback_passages=[1,3,3]", "label.feedback_passages", "ascending numbers, each of them once"),
        ("label.feedback_passages=[0,3]", "label.feedback_passages[0]", "greater than 0"),
        ("label.feedback_passages=[true,3]", "label.feedback_passages[0]", "an integer"),
        ("retrieve.engine=centroids", "retrieve.engine", "needs a residual codec"),
        ("distill.objective=label_smoothing", "distill.smoothing", "needs a share above 0"),
        ("distill.workers=8-2", "distill.workers", "smaller number first"),
        ("distill.workers=0-2", "distill.workers", "auto or a number"),
        ("distill.workers=17", "distill.workers", "at most distill.batch_size (4)"),
        ("teacher.workers=2-99", "teacher.workers", "at most teacher.batch_size"),
        ("tune.grace=7", "tune.grace", "at most tune.measurements (6)"),
        ("teacher.patience=2", "teacher.patience", "set teacher.evaluate_every"),
        ("distill.accumulate=99", "distill.accumulate", "at most distill.batch_size"),
        ("evaluate.measures=[MRR@10,magic@3]", "evaluate.measures[1]", "unknown measure 'magic@3'"),
        ("evaluate.measures=[MRR@10,RBP@10]", "evaluate.measures[1]", "'RBP@10' cannot be computed: nothing"),
        ("evaluate.measures=[alpha_nDCG@10]", "evaluate.measures[0]", "what can be: AP, Accuracy"),
        ("evaluate.measures=[ERR]", "evaluate.measures[0]", "cannot be computed"),
        ("evaluate.measures=[ERR@20]", "evaluate.measures[0]", "ids that are not numbers"),
        ("evaluate.measures=[P_IA@5]", "evaluate.measures[0]", "cannot be computed"),
        ("evaluate.measures=['P(rel=0)@5']", "evaluate.measures[0]", "relevance_level should be positive"),
        ("compare.objectives=[collective,cross_encoder]", "compare.objectives[1]", "needs cross_encoder.scores"),
        ("run.name.x=1", "run.name.x", "name is 'quickstart', not a section"),
    ],
)
def test_each_problem_names_the_key_and_the_way_out(override: str, path: str, message: str) -> None:
    found = problems(override)
    assert path in found and message in found[path], found


def test_a_trial_is_long_enough_for_its_grace() -> None:
    """Six measurements of a training of four steps are one a step, of which there are four."""
    found = problems("distill.steps=4", "tune.measurements=6", "tune.grace=6")
    assert found == {"tune.grace": "a trial of distill.steps (4) ends before that many measurements"}
    load_config(None, ["distill.steps=4", "tune.measurements=6", "tune.grace=4"])


def test_workers_of_a_teacher_that_is_given_do_not_count() -> None:
    load_config(None, ["teacher.workers=999", "teacher.checkpoint=somewhere"])


def test_measures_beside_the_usual_ones_are_taken_when_they_can_be_computed() -> None:
    assert load_config(None, ["evaluate.measures=[infAP,Rprec,Judged@10,'P(rel=2)@5']"]).evaluate.measures[0] == "infAP"
    scores = ["compare.objectives=[cross_encoder]", "cross_encoder.scores=scores.tsv"]
    assert load_config(None, scores).compare.objectives == ["cross_encoder"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distill: [", "not valid YAML"),
        ("distill:\n  beta: 1\n  beta: 2\n", "distill.beta: is given twice, in lines 2 and 3"),
        ("a: " + "[" * 20000, "nested too deeply"),
        ("run: {name: 2024-13-45}", "not valid YAML"),
        ("[a]: 1", "not valid YAML"),
        ("run: &a {name: *a}", "run.name"),
        ("- a\n- b\n", "expected sections"),
        ("run: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load_config(str(path))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml.*cannot be read"):
        load_config("nowhere.yaml")


def test_an_override_without_a_value() -> None:
    assert "expected key=value" in problems("distill.temperature")[""]


def test_the_tree_does_not_change_after_loading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().run.name = "other"  # type: ignore[misc]


def test_twice_given_keys_are_reported_with_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("run: {name: a, name: b}\nfoo: 1\nteacher: {steps: 5, steps: 0}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert [problem.path for problem in caught.value.problems] == ["run.name", "teacher.steps", "teacher.steps", "foo"]


def test_a_small_file_of_anchors_makes_no_large_message(tmp_path: Path) -> None:
    """Each line doubles the one before: written out, the last would be 2**60 items long."""
    lines = ["l0: &l0 [x, x]"] + [f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]" for i in range(1, 60)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join([*lines, "run: *l59", "evaluate: {measures: *l59}"]))
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert len(str(caught.value)) < 10_000


def test_overrides_of_one_section_leave_its_anchored_twin_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("teacher: &t {steps: 5, warmup: 0.5}\ndistill: *t\nlabel:\nembed: {<<: {token_budget: 32}}\n")
    c = load_config(str(path), ["distill.steps=7", "distill={beta: 0.5}"])
    assert (c.teacher.steps, c.distill.steps, c.distill.warmup, c.distill.beta) == (5, 7, 0.5, 0.5)
    assert c.label.clusters == 24 and c.embed.token_budget == 32


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("teacher: {learning_rate: 3e-6, steps: 1e3, weight_decay: 1E-2}\n")
    t = load_config(str(path)).teacher
    assert (t.learning_rate, t.steps, t.weight_decay) == (3e-6, 1000, 0.01)


def test_a_split_of_single_files_needs_both() -> None:
    found = problems(
        "collection.format=msmarco",
        "collection.passages=c.tsv",
        "collection.queries={train: q, dev: d}",
        "collection.qrels={train: r}",
        "collection.limit=null",
    )
    assert found == {"collection.qrels.dev": "is missing: a split needs both its queries and its qrels"}


def test_the_configuration_imports_neither_torch_nor_ray() -> None:
    code = "import sys, ckd_ray.config; sys.exit(len({'torch', 'ray', 'pandas', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
