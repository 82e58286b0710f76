"""The plan of a comparison, its table by hand, and BM25 against the formula."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ckd_ray.checks import load_config
from ckd_ray.compare import job
from ckd_ray.compare.plan import objectives, variants
from ckd_ray.compare.table import System, build_table, render_markdown, render_text
from ckd_ray.config import ConfigError
from ckd_ray.errors import UserError
from ckd_ray.evaluate import bm25
from ckd_ray.evaluate.significance import holm
from ckd_ray.pipeline.baselines import measure_baselines
from ckd_ray.pipeline.graph import STAGES, stage_fingerprint
from ckd_ray.runs.directory import RunContext
from ckd_ray.runs.finished import open_finished
from tests.support import overrides, write_collection


def test_variants_differ_in_the_distillation_alone() -> None:
    changed = "compare.settings={self_distillation: {temperature: 1.0, loss: kl}}"
    config = load_config(None, ["compare.seeds=[3, 4]", changed])
    planned = variants(config)
    assert objectives(config) == ["contrastive", "label_smoothing", "self_distillation", "collective"]
    assert [(v.objective, v.seed) for v in planned][:5] == [*((o, 3) for o in objectives(config)), ("contrastive", 4)]
    assert {v.config.distill.smoothing for v in planned if v.objective == "label_smoothing"} == {0.1}
    assert {v.config.distill.smoothing for v in planned if v.objective != "label_smoothing"} == {0.0}
    assert {v.config.distill.temperature for v in planned} == {"auto", 1.0}
    fingerprints: dict[str, set[str]] = {}
    for variant in planned:
        done: dict[str, str] = {}
        for stage in STAGES:
            done[stage.name] = stage_fingerprint(stage, variant.config, done, "source")
            fingerprints.setdefault(stage.name, set()).add(done[stage.name])
    assert {name: len(found) for name, found in fingerprints.items() if len(found) > 1} == {"distill": 8, "evaluate": 8}
    paths = RunContext.of(planned[0].config, planned[0].folder).paths
    assert paths.student.endswith("/compare/contrastive-3/student")
    assert paths.labels == RunContext.of(config).paths.labels


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("compare.settings={collective: {steps: 9}}", "compare.settings.collective.steps: cannot differ"),
        ("compare.settings={collective: {temperature: 0}}", "compare.settings.collective.temperature"),
        ("compare.settings={collective: {expansion_size: 90}}", "at most label.clusters"),
        ("compare.settings={label_smoothing: {smoothing: 0}}", "label_smoothing.smoothing: objective label_smoothing"),
        ("compare.settings={contrastive: {smoothing: 0.1}}", "compare.settings.contrastive.smoothing: objective"),
        ("compare.objectives=[cross_encoder]", "compare.objectives[0]: cross_encoder.scores: objective"),
        ("compare.settings={colective: {beta: 1}}", "compare.settings.colective"),
        ("compare.objectives=[collective, collective]", "compare.objectives[1]: 'collective' is listed twice"),
        ("compare.objectives=[]", "compare.objectives"),
        ("compare.seeds=[1, 1]", "compare.seeds[1]: 1 is listed twice"),
        ("evaluate.skip_same_id=maybe", "expected auto or true or false"),
        ("evaluate.engine=fast", "evaluate.engine"),
        ("evaluate.baselines=[encoder, encoder]", "evaluate.baselines[1]: 'encoder' is listed twice"),
        ("tracking=[wandb, wandb]", "tracking.to[1]: 'wandb' is listed twice"),
        ("evaluate.baselines=[encodr]", "'encoder' or 'bm25'"),
    ],
)
def test_wrong_settings_are_named(value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [value])
    assert message in str(caught.value)


def test_a_comparison_records_its_run_and_refuses_before_it_trains(tmp_path: Path, tiny_backbone: str) -> None:
    folder = write_collection(tmp_path / "collection")
    for kind in ("queries", "qrels"):
        (folder / f"{kind}.dev.tsv").unlink()
    values = overrides(tmp_path, tiny_backbone, str(folder), "compare.bm25=false")
    config = load_config(None, [*values, "evaluate.splits=[dev]"])
    with pytest.raises(UserError, match=r"nothing to compare on(.|\n)*one of test"):
        job.run_compare(config)
    assert not (tmp_path / config.run.name / "teacher").exists()

    recorded = open_finished(str(tmp_path / config.run.name)).record  # by the path of the run, not of a variant
    assert recorded["config"]["evaluate"]["splits"] == ["dev"] and "variant" not in recorded


def test_the_own_passage_is_skipped_for_beir_and_on_request() -> None:
    from ckd_ray.pipeline.stages.evaluate import skips_own_passage

    beir = ["collection.format=beir", "collection.path=x"]
    assert skips_own_passage(load_config(None, beir))
    assert not skips_own_passage(load_config(None, [*beir, "evaluate.skip_same_id=false"]))
    assert skips_own_passage(load_config(None, ["collection.format=ir_datasets", "collection.path=beir/arguana"]))
    assert not skips_own_passage(load_config(None, ["collection.format=msmarco", "collection.path=x"]))
    assert skips_own_passage(load_config(None, ["evaluate.skip_same_id=true"]))


def test_the_table_by_hand() -> None:
    floor = System("bm25", [], {"dev": {"R@1": np.array([[0.0, 1.0, 0.0, 0.0]])}})
    plain = System("contrastive", [1, 2], {"dev": {"R@1": np.array([[0, 1, 0, 1], [0, 1, 1, 1.0]])}}, 10.0, 0.0)
    better = System("collective", [1, 2], {"dev": {"R@1": np.array([[1, 1, 1, 1], [1, 1, 0, 1.0]])}}, 12.0, 8.0)
    table = build_table([floor, plain, better], 4000)
    cells = table["splits"]["dev"]["R@1"]
    assert [cells[n]["mean"] for n in ("bm25", "contrastive", "collective")] == [0.25, 0.625, 0.875]
    assert cells["collective"]["seeds"] == [1.0, 0.75]
    assert cells["collective"]["standard_deviation"] == pytest.approx(math.sqrt(2) / 8)
    assert cells["collective"]["difference_mean"] == pytest.approx(0.25)
    # Differences of the seeds' means: 1, 0, 0, 0. Every sign pattern has the observed size, so p is 1.
    assert cells["collective"]["difference_p"] == 1.0
    assert cells["bm25"]["difference_mean"] == pytest.approx(-0.375)
    assert "difference_p" not in cells["contrastive"]
    tested = [cells[name] for name in ("bm25", "collective")]
    assert [cell["difference_p_holm"] for cell in tested] == holm([cell["difference_p"] for cell in tested])
    assert table["systems"]["collective"]["label_seconds_a_query"] == pytest.approx(0.002)
    markdown = render_markdown(table)
    assert "| collective | 0.8750 [" in markdown and "+0.2500, p 1.0000, Holm 1.0000 | 12 | 2.00 |" in markdown
    assert max(map(len, render_text(table).splitlines())) <= 100
    assert "collective " in render_text(table) and "+0.2500" in render_text(table)


def test_a_baseline_that_cannot_be_measured_is_left_out_with_the_reason(
    tmp_path: Path,
    tiny_backbone: str,
    tiny_collection: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from ckd_ray.pipeline import baselines
    from ckd_ray.pipeline.runner import run_stages

    values = overrides(tmp_path, tiny_backbone, tiny_collection)
    run_stages(load_config(None, values), until="collection")

    def left_out(name: str, *more: str) -> str:
        found = measure_baselines(RunContext.of(load_config(None, [*values, *more])), ["dev"], [name])
        assert found.folders == {} and not (tmp_path / "tiny" / "baselines").exists()
        assert f"baselines: {name} is left out: {found.left_out[name]}" in capsys.readouterr().err
        return found.left_out[name]

    assert "60 passages are more than evaluate.bm25_passages (59)" in left_out("bm25", "evaluate.bm25_passages=59")
    assert "'no_such_thing' is not installed" in left_out("encoder", "model.backbone=package:no_such_thing/model")
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    assert "pip install bm25s" in left_out("bm25")


def test_bm25_is_lucene_s_formula(tmp_path: Path, tiny_collection: str) -> None:
    import pyarrow.parquet as pq

    from ckd_ray.data import Collection, build_collection

    config = load_config(None, ["collection.format=msmarco", f"collection.path={tiny_collection}"])
    build_collection(config.collection, str(tmp_path), progress=lambda done, total: None)
    bm25.rank_bm25(str(tmp_path), ["dev"], str(tmp_path / "out"), 20)
    found = pq.read_table(tmp_path / "out" / "dev-000000.parquet").to_pandas()
    collection = Collection.open(str(tmp_path))
    texts = [bm25.words(t) for t in collection.iter_passages(0, 60)]
    mean = sum(map(len, texts)) / 60
    for query, text in zip(collection.queries("dev").ids, collection.queries("dev").texts, strict=True):
        literal = np.zeros(60)
        for word in bm25.words(text):
            df = sum(word in t for t in texts)
            idf = math.log(1 + (60 - df + 0.5) / (df + 0.5))
            tf = np.array([t.count(word) for t in texts])
            literal += idf * tf / (tf + bm25.K1 * (1 - bm25.B + bm25.B * np.array([len(t) for t in texts]) / mean))
        mine = found[found["query_id"] == query].sort_values("rank")
        expected = np.sort(literal[literal > 0])[::-1][:20]
        assert np.allclose(mine["score"], expected, atol=1e-4)
        assert np.allclose(literal[mine["passage_index"]], expected, atol=1e-4)


def test_bm25_of_a_collection_without_words_finds_nothing(tmp_path: Path) -> None:
    """bm25s itself fails on an index of no word."""
    import pyarrow.parquet as pq

    from ckd_ray.data import build_collection

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "collection.tsv").write_text("p1\t.\np2\tthe\n")
    for split in ("train", "dev"):
        (folder / f"queries.{split}.tsv").write_text(f"q-{split}\twhat is it\n")
        (folder / f"qrels.{split}.tsv").write_text(f"q-{split}\t0\tp1\t1\n")
    config = load_config(None, ["collection.format=msmarco", f"collection.path={folder}"])
    build_collection(config.collection, str(tmp_path), progress=lambda done, total: None)
    bm25.rank_bm25(str(tmp_path), ["dev"], str(tmp_path / "out"), 20)
    assert pq.read_table(tmp_path / "out" / "dev-000000.parquet").num_rows == 0
