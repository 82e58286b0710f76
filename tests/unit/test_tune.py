"""The space of a search, and what it suggests; no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ckd_ray.checks import load_config
from ckd_ray.config import Config
from ckd_ray.config.load import ConfigError
from ckd_ray.distill.task import TrainingTask
from ckd_ray.errors import UserError
from ckd_ray.pipeline.stages import embed, label
from ckd_ray.runs.directory import RunContext, labels_folder
from ckd_ray.tune import job
from ckd_ray.tune.records import Records, Trial
from ckd_ray.tune.search import trial_task
from ckd_ray.tune.space import Parameter, candidates, parse, space_of, split, values_of, with_values
from ckd_ray.tune.suggest import Suggester
from tests.support import overrides, write_collection


def config(*values: str) -> Config:
    return load_config(None, values)


@pytest.mark.parametrize(
    ("space", "path", "message"),
    [
        ("{distill.temprature: {choice: [1]}}", "distill.temprature", "did you mean distill.temperature?"),
        ("{distill.steps: {choice: [1]}}", "distill.steps", "cannot vary"),
        ("{distill.beta: {range: [0, 1]}}", "distill.beta", "expected one of choice, uniform, loguniform, int"),
        ("{distill.beta: {choice: 3}}", "distill.beta", "takes a list"),
        ("{distill.beta: {choice: []}}", "distill.beta", "takes a list"),
        ("{distill.beta: {choice: [1, 1]}}", "distill.beta", "twice"),
        ("{distill.beta: {uniform: [1, 0.5]}}", "distill.beta", "ascending"),
        ("{distill.temperature: {loguniform: [0, 1]}}", "distill.temperature", "above 0"),
        ("{distill.expansion_size: {int: [1, 2.5]}}", "distill.expansion_size", "whole numbers"),
        ("{distill.temperature: {uniform: [0.1, 1000]}}", "distill.temperature", "less than or equal to 100"),
        ("{distill.negatives_depth: {choice: [50, 500]}}", "distill.negatives_depth", "retrieve.depth"),
        ("{label.feedback_passages: {choice: [3, [1, 3]]}}", "label.feedback_passages", "plain values"),
        ("{label.feedback_passages: {choice: [3, 300]}}", "label.feedback_passages", "at most retrieve.depth (100)"),
        ("{label.token_vote: {choice: [nobody]}}", "label.token_vote", "collection"),
        ("{label.clusters: {uniform: [12, 24]}}", "label.clusters", "use int or choice"),
        ("{distill.negatives: {loguniform: [1, 8]}}", "distill.negatives", "use int or choice"),
        ("{distill.zero_row_floor: {uniform: [0, 1]}}", "distill.zero_row_floor", "use choice"),
    ],
)
def test_mistakes_in_the_space_are_named(space: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config(f"tune.space={space}")
    assert [p.path for p in raised.value.problems] == [f"tune.space.{path}"]
    assert message in raised.value.problems[0].message


def test_depths_do_not_vary_where_the_configuration_lists_several() -> None:
    space = "tune.space={label.feedback_passages: {choice: [1, 3]}}"
    assert space_of(config(space))["label.feedback_passages"] == Parameter("choice", (1, 3))
    with pytest.raises(ConfigError, match=r"cannot vary while label.feedback_passages is a list, \[1, 5\]"):
        config(space, "label.feedback_passages=[1, 5]")
    varied = config("tune.space={label.clusters: {choice: [12, 24]}}", "label.feedback_passages=[1, 5]")
    found = candidates(varied, space_of(varied), 3, seed=1)
    assert [with_values(varied, values).label.depths for values in found] == [(1, 5)] * 2


def test_keys_of_the_labels_change_nothing_for_other_objectives() -> None:
    with pytest.raises(ConfigError, match="changes nothing for objective self_distillation"):
        config("distill.objective=self_distillation", "tune.space={distill.beta: {choice: [0.1, 1]}}")
    assert "distill.beta" not in space_of(config("distill.objective=self_distillation"))


def test_the_floor_is_under_the_student_s_scores_too_and_varies_for_every_objective() -> None:
    floor = "tune.space={distill.zero_row_floor: {choice: [false, true]}}"
    alone = config("distill.objective=self_distillation", floor)
    plain = space_of(alone)
    assert split(plain, alone) == ({}, plain)  # no labels, whose worth would show without training
    assert split(plain, config(floor)) == (plain, {})


def test_a_search_draws_no_negatives_that_the_classifier_has_not_scored() -> None:
    space = "tune.space={distill.negatives_depth: {choice: [10, 50]}}"
    teacher = ("distill.objective=cross_encoder", "cross_encoder.model=m", "distill.negatives_depth=20")
    with pytest.raises(ConfigError, match=r"only 20 .* scored; raise cross_encoder\.depth, found 50"):
        config(*teacher, space)
    config(*teacher, "cross_encoder.depth=50", space)
    config("distill.negatives_depth=20", space)


def test_a_collection_without_dev_is_refused_before_anything_is_trained(tmp_path: Path, tiny_backbone: str) -> None:
    pytest.importorskip("optuna")
    folder = write_collection(tmp_path / "collection")
    for kind in ("queries", "qrels"):
        (folder / f"{kind}.dev.tsv").unlink()
    given = load_config(None, overrides(tmp_path, tiny_backbone, str(folder)))
    with pytest.raises(UserError, match="the search needs labelled dev queries"):
        job.run_tune(given)
    assert not (tmp_path / given.run.name / "teacher").exists()


def test_what_an_objective_does_not_take_is_not_varied() -> None:
    smoothed = config("distill.objective=label_smoothing", "distill.smoothing=0.1")
    assert space_of(smoothed) == {"distill.smoothing": Parameter("choice", (0.02, 0.1))}
    assert "distill.temperature" not in space_of(config("distill.objective=contrastive"))
    of_teacher = {"distill.loss", "distill.temperature", "distill.teacher_weight", "distill.smoothing"}
    assert space_of(config("distill.objective=self_distillation")).keys() == of_teacher
    of_collective = {f"distill.{key}" for key in ("expansion_share", "expansion_size", "encoder_share", "bm25_share")}
    assert space_of(config()).keys() == {*of_teacher, *of_collective}
    free = config("tune.space={distill.temperature: {loguniform: [0.5, 8]}, distill.beta: {choice: [auto, 0.3]}}")
    assert space_of(free)["distill.beta"].values == ("auto", 0.3)
    with pytest.raises(ConfigError, match="changes nothing for objective contrastive"):
        config("distill.objective=contrastive", "tune.space={distill.temperature: {uniform: [0.1, 1]}}")
    with pytest.raises(ConfigError, match="needs a share above 0"):
        config(
            "distill.objective=label_smoothing", "distill.smoothing=0.1",
            "tune.space={distill.smoothing: {choice: [0.0, 0.1]}}",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "low", "high", "kind"),
    [({"uniform": [0, 1]}, 0, 1, float), ({"loguniform": [0.01, 10]}, 0.01, 10, float), ({"int": [3, 5]}, 3, 5, int)],
)
def test_ranges_are_drawn_from_within_and_wholly(spec: dict, low: float, high: float, kind: type) -> None:
    random = np.random.default_rng(0)
    drawn = [parse(spec).draw(random) for _ in range(3000)]
    assert all(type(v) is kind and low <= v <= high for v in drawn)
    if kind is int:
        assert set(drawn) == {3, 4, 5}
    elif spec.get("loguniform"):
        assert np.median(drawn) == pytest.approx(0.316, rel=0.15)  # the middle in the logarithm
    else:
        assert np.mean(drawn) == pytest.approx(0.5, abs=0.03)


def test_a_small_grid_is_taken_whole_after_the_configuration_and_impossible_ones_are_left_out() -> None:
    given = config("tune.space={label.clusters: {choice: [6, 24]}, distill.expansion_size: {choice: [5, 10]}}")
    found = candidates(given, split(space_of(given), given)[0], 10, seed=1)
    assert found[0] == {"label.clusters": 24, "distill.expansion_size": 10}
    # ten of six clusters cannot be
    assert [tuple(v.values()) for v in found[1:]] == [(6, 5), (24, 5)]


def test_a_large_grid_is_drawn_without_repeats() -> None:
    given = config("tune.space={distill.beta: {uniform: [0, 2]}, label.voters: {int: [1, 3]}}")
    space = space_of(given)
    found = candidates(given, space, 12, seed=1)
    assert len(found) == 12 and len({tuple(v.values()) for v in found}) == 12
    assert found == candidates(given, space, 12, seed=1) != candidates(given, space, 12, seed=2)
    assert {v["label.voters"] for v in found[1:]} <= {1, 2, 3}


def test_values_are_put_into_a_configuration_and_read_back() -> None:
    values = {"distill.temperature": 2.5, "label.voters": 3}
    changed = with_values(config(), values)
    assert values_of(changed, values) == values and changed.teacher == config().teacher


def _suggester(search: str, trials: int = 30) -> Suggester:
    space = {
        "distill.temperature": Parameter("loguniform", (0.1, 10.0)),
        "distill.smoothing": Parameter("choice", (0.0, 0.1)),
    }
    kept = [{"distill.beta": 0.3}, {"distill.beta": 1.0}]
    default = {"distill.beta": 0.3, "distill.temperature": 0.25, "distill.smoothing": 0.02}
    return Suggester(kept, space, default, search=search, seed=5, trials=trials)


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_suggestions_depend_on_the_number_and_on_what_has_ended_alone(search: str) -> None:
    ended: list[Trial] = []
    for number in range(8):
        values = _suggester(search, 8).values(number, ended)
        assert values == _suggester(search, 8).values(number, list(ended))
        assert values.keys() == {"distill.beta", "distill.temperature", "distill.smoothing"}
        state = "stopped" if number % 3 == 2 else "finished"
        worth = values["distill.temperature"] / 10
        ended.append(Trial(number, values, state, [[10, worth / 2, 1.0], [20, worth, 2.0]], ended=number))
    assert ended[0].values["distill.temperature"] == 0.25  # the configuration itself
    assert len({tuple(t.values.values()) for t in ended}) == 8


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_each_combination_of_a_small_space_is_tried_once(search: str) -> None:
    space = {"distill.smoothing": Parameter("choice", (0.0, 0.1)), "distill.negatives": Parameter("int", (1, 3))}
    kept = [{"distill.beta": 0.3}, {"distill.beta": 1.0}]

    def suggester(trials: int, smoothing: float = 0.1) -> Suggester:
        default = {"distill.beta": 0.3, "distill.smoothing": smoothing, "distill.negatives": 1}
        return Suggester(kept, space, default, search=search, seed=5, trials=trials)

    assert (suggester(100).trials, suggester(5).trials) == (12, 5)
    assert suggester(100, smoothing=0.05).trials == 13  # the configuration itself is none of them
    ended: list[Trial] = []
    for number in range(12):
        values = suggester(100 if number > 4 else 5).values(number, ended)  # more trials are asked for on the way
        ended.append(Trial(number, values, "finished", [[10, 0.5, 1.0]], ended=number))
    assert ended[0].values == suggester(5).default
    assert len({tuple(t.values[key] for key in sorted(t.values)) for t in ended}) == 12


def test_optuna_goes_where_it_was_good() -> None:
    ended: list[Trial] = []
    suggester = _suggester("optuna")
    for number in range(30):
        values = suggester.values(number, ended)
        worth = 1 - abs(np.log(values["distill.temperature"] / 3)) / 5 + 0.5 * (values["distill.beta"] == 1.0)
        ended.append(Trial(number, values, "finished", [[20, float(worth), 2.0]], ended=number))
    late = [t.values for t in ended[20:]]
    assert np.mean([v["distill.beta"] == 1.0 for v in late]) >= 0.7
    assert 1.5 < np.median([v["distill.temperature"] for v in late]) < 6


def test_records_are_read_back_and_the_best_is_a_finished_one(tmp_path: Path) -> None:
    records = Records(str(tmp_path))
    for number, (state, values) in enumerate(
        [("finished", [0.2, 0.5]), ("stopped", [0.9]), ("finished", [0.5, 0.4]), ("failed", [])]
    ):
        trial = Trial(number, {"distill.beta": 1.0}, measurements=[[i + 1, v, 1.0] for i, v in enumerate(values)])
        records.write(trial)
        records.end(trial, state, "no memory" if state == "failed" else None)  # type: ignore[arg-type]
    again = Records(str(tmp_path))
    assert again.trials == records.trials
    assert [t.number for t in again.ended()] == [0, 1, 2]
    best = again.best()
    assert best is not None and best.number == 0 and best.best == 0.5
    assert again.rows()[3]["cause"] == "no memory" and again.rows()[1]["mrr@10"] == 0.9


def test_a_search_that_goes_on_stops_weak_trials_as_it_would_have(tmp_path: Path) -> None:
    from ckd_ray.tune.search import METRIC, TIME, _GentleASHA, _replay

    def ask(records: Records, value: float) -> list[str]:
        stopped: list[str] = []
        searcher = SimpleNamespace(stop=stopped.append)
        asha = _GentleASHA(
            searcher, time_attr=TIME, metric=METRIC, mode="max", max_t=61, grace_period=10, reduction_factor=3
        )
        _replay(asha, records)
        trial = SimpleNamespace(trial_id="new")
        asha.on_trial_add(None, trial)
        assert asha.on_trial_result(None, trial, {TIME: 10, METRIC: value}) == "CONTINUE"
        return stopped

    records = Records(str(tmp_path))
    assert ask(records, 0.1) == []  # nothing to compare with
    for number, value in enumerate((0.5, 0.6, 0.7)):
        records.write(Trial(number, {}, "finished", [[10, value, 1.0], [20, value, 2.0]], ended=number))
    records.write(Trial(3, {}, "running", [[10, 0.65, 1.0]]))  # was in the middle when the search was killed
    assert ask(records, 0.1) == ["new"] and ask(records, 0.69) == []


def test_the_ledger_tells_finished_stopped_and_failed_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ckd_ray.tune.search import _Recorder, _Table

    records = Records(str(tmp_path))
    for number in range(3):
        records.write(Trial(number, {"distill.beta": 0.1 * number}))
    searcher = SimpleNamespace(numbers={"a": 0, "b": 1, "c": 2})
    told: list[int] = []  # of those that have ended
    table: Any = _Table(records, {"distill.beta": 0.3})
    ledger = _Recorder(records, searcher, table, steps=20, ended=lambda t: told.append(t.number))  # type: ignore[arg-type]
    trials = {name: SimpleNamespace(trial_id=name) for name in "abcx"}
    results = [("a", 10, 0.4), ("b", 10, 0.3), ("a", 10, 0.9), ("a", 20, 0.5), ("x", 10, 1.0)]
    for name, steps, value in results:  # a step that is reported again, and a trial that is not ours, do not count
        ledger.on_trial_result(0, [], trials[name], {"steps": steps, "mrr@10": value, "time_this_iter_s": 2.0})
    ledger.on_trial_result(0, [], trials["c"], {"cause": "step 3: loss nan"})
    for name in "abcx":
        ledger.on_trial_complete(0, [], trials[name])
    again = Records(str(tmp_path)).trials
    assert [t.state for t in again.values()] == ["finished", "stopped", "failed"] and told == [0, 1, 2]
    assert again[0].measurements == [[10, 0.4, 2.0], [20, 0.5, 4.0]] and again[2].cause == "step 3: loss nan"
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("<- best") and said[1].endswith("stopped") and "failed: step 3: loss nan" in said[2]


def test_a_report_without_the_metric_ends_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that is stopped between two measurements reports once more, without MRR@10."""
    import os

    from ckd_ray.tune.search import _own_output

    monkeypatch.delenv("TUNE_DISABLE_STRICT_METRIC_CHECKING", raising=False)
    with _own_output():
        assert os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] == "1"
    assert "TUNE_DISABLE_STRICT_METRIC_CHECKING" not in os.environ


def _made(folder: Path, seconds: float) -> None:
    folder.mkdir(parents=True)
    (folder / "_manifest.json").write_text(json.dumps({"made_of": "hand", "seconds": seconds}))


def test_the_time_of_a_search_has_its_first_pass_and_the_labels_of_every_kept_setting(tmp_path: Path) -> None:
    given = config(f"run.storage={tmp_path}", "run.name=r", "distill.steps=20")
    kept = [
        {"label.clusters": given.label.clusters, "distill.beta": 0.3},  # labels of the run itself
        {"label.clusters": 12, "distill.beta": 0.3},
        {"label.clusters": 12, "distill.beta": 1.0},  # shares them
    ]
    _made(tmp_path / "r" / "embeddings", 100)
    _made(tmp_path / "r" / "labels", 20)
    other = with_values(given, kept[1]).label
    assert job._labels_folder(given, kept[1]) == labels_folder(other.model_dump(mode="json"))
    _made(tmp_path / "r" / job._labels_folder(given, kept[1]), 30)
    records = Records(str(tmp_path / "trials"))
    for number, (state, steps, seconds) in enumerate([("finished", 20, 40.0), ("stopped", 10, 20.0), ("failed", 0, 0)]):
        measured = [[steps, 0.5, seconds]] if steps else []
        records.write(Trial(number, {}, state, measured, seconds))  # type: ignore[arg-type]
    upstream = [embed.STAGE, label.STAGE]
    saved = job._saved(given, records, upstream, RunContext.of(given), kept, 7.0)
    assert saved["search_seconds"] == 120 + 7 + 30 + 60 and saved["as_pipelines_seconds"] == 2 * (120 + 40)
    assert saved["share"] == round(1 - 217 / 320, 4) and saved["steps_share"] == 0.75


def test_a_search_that_goes_on_keeps_what_the_first_pass_found_and_its_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(
        f"run.storage={tmp_path}", "tune.space={distill.beta: {choice: [0.3, 1.0, 2.0]}}", "tune.label_kept=2",
        "distill.beta=0.3",
    )  # fmt: skip
    calls = []

    def judged(context: Any, folder: str, combinations: Any) -> tuple[list[float], float]:
        calls.append(folder)
        return [0.5, 0.4, 0.6], 12.5

    monkeypatch.setattr(job, "first_pass", judged)
    context = RunContext.of(given)
    first = job._first(context, given, str(tmp_path / "search"), 1)
    assert first[0] == [{"distill.beta": 0.3}, {"distill.beta": 2.0}] and first[2] == 12.5
    assert job._first(context, given, str(tmp_path / "search"), 1) == first and len(calls) == 1
    (tmp_path / "search" / "first_pass.json").write_text(json.dumps(first[1]))  # as earlier versions wrote it
    assert job._first(context, given, str(tmp_path / "search"), 1) == (*first[:2], 0.0) and len(calls) == 1


def test_the_first_pass_counts_what_an_earlier_try_has_made(tmp_path: Path) -> None:
    from ckd_ray.runs.artifact import make
    from ckd_ray.tune.first_pass import _timed, seconds_of

    out = str(tmp_path / "rankings")
    assert seconds_of(out) == 0
    assert make(out, "a", _timed(lambda: {"count": 3}))
    manifest = json.loads((tmp_path / "rankings" / "_manifest.json").read_text())
    assert manifest["count"] == 3 and manifest["seconds"] == seconds_of(out) >= 0
    (tmp_path / "rankings" / "_manifest.json").write_text(json.dumps({**manifest, "seconds": 9.0}))
    assert not make(out, "a", _timed(lambda: {"count": 3})) and seconds_of(out) == 9.0


def test_a_trial_trains_with_every_value_of_its_configuration() -> None:
    """No key is copied by hand: whatever a search varies reaches the training."""
    given = config("tune.measurements=4", "distill.steps=40", "tune.dev_queries=7")
    base = TrainingTask("distill", "run", "start", "base", 17, given.distill, labels="labels")
    values = {"distill.loss": "mixture", "distill.teacher_weight": 0.25, "distill.sampling": "uniform"}
    changed = with_values(given, {**values, "distill.beta": 0.7, "distill.score_scale": 3.0})
    task = trial_task(base, changed, "trial", "tune/labels-x")
    assert (task.fingerprint, task.labels, task.run, task.seed) == ("trial", "tune/labels-x", "run", 17)
    expected = changed.distill.model_dump() | {
        "evaluate_every": 10, "checkpoint_every": 10, "patience": 0, "dev_queries": 7,
        "dev_passages": given.tune.dev_passages,
    }  # fmt: skip
    assert task.settings.model_dump() == expected


def test_trials_with_words_and_numbers_in_one_key_are_written(tmp_path: Path) -> None:
    given = config(f"run.storage={tmp_path}")
    context = RunContext.of(given)
    records = Records(context.paths.tune)
    for number, value in enumerate(("auto", 1.0, 2.0)):
        values = {"distill.temperature": value, "distill.expansion_share": 0.1 * number}
        records.write(Trial(number, values, "finished", [[10, 0.5, 1.0]], ended=number))
    job._write_trials(context, records)
    table = pq.read_table(Path(context.paths.tune) / "trials.parquet").to_pydict()
    assert table["distill.temperature"] == ["auto", "1.0", "2.0"]
    assert table["distill.expansion_share"] == pytest.approx([0.0, 0.1, 0.2])
