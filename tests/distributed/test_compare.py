"""A comparison through real Ray: what is shared is not made again, what is finished stays, what is not needed goes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ckd_ray.checks import load_config
from ckd_ray.compare.job import run_compare
from ckd_ray.config import Config
from ckd_ray.errors import UserError
from ckd_ray.evaluate.against import Side, compare_runs
from ckd_ray.evaluate.runs import read_trec_run
from ckd_ray.pipeline.evaluation import measure_system
from ckd_ray.runs.directory import RunContext
from ckd_ray.runs.finished import open_finished
from tests.finished import Finished
from tests.here import in_this_process
from tests.support import overrides

OBJECTIVES = "compare.objectives=[collective]"


def config(storage: Path, backbone: str, collection: str, *more: str) -> Config:
    """contrastive is always there; two steps each, at a rate that makes the students differ."""
    changes = ("teacher.steps=1", "distill.steps=2", "distill.learning_rate=0.01", "embed.passages_per_shard=64")
    return load_config(None, overrides(storage, backbone, collection, *changes, "compare.seeds=[5]", OBJECTIVES, *more))


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_small_comparison_of_a_finished_run(ray_session: None, finished_run: Finished, tmp_path: Path) -> None:
    """It trains its two students alone, and its table has what their files have."""
    run = finished_run.copy(tmp_path)
    upstream, before = ("teacher", "embeddings", "rankings", "labels", "student", "baselines"), times(run)
    mine = load_config(None, finished_run.values(tmp_path, "compare.seeds=[5]", OBJECTIVES, "distill.steps=2"))
    with in_this_process():
        table = run_compare(mine)
    after = times(run)
    assert before.keys() <= after.keys()
    assert [name for name in before if name.startswith(upstream) and after[name] != before[name]] == []
    assert list(table["systems"]) == ["encoder", "bm25", "teacher", "contrastive", "collective"]
    students = set()
    for name in ("contrastive", "collective"):
        folder = run / "compare" / f"{name}-5"
        students.add((folder / "student" / "model.safetensors").read_bytes())
        assert not (folder / "student_embeddings").exists()
        for split in ("dev", "test"):
            values = json.loads((folder / "evaluation" / f"student.{split}.per_query.json").read_text())["nDCG@10"]
            mean = table["splits"][split]["nDCG@10"][name]["mean"]
            assert mean == pytest.approx(np.mean(list(values.values()))) and len(values) == 6
    assert len(students) == 2
    with in_this_process():
        assert run_compare(mine) == table
    changed = {Path(name).name for name, when in times(run).items() if after.get(name) != when}
    assert changed <= {"run.json", "table.json", "table.md"}, "nothing is trained or measured a second time"


@pytest.mark.soak
def test_a_comparison_shares_resumes_and_tests(
    ray_session: None, tmp_path: Path, tiny_backbone: str, tiny_collection: str
) -> None:
    baselines = "evaluate.baselines=[encoder,bm25]"
    table = run_compare(config(tmp_path, tiny_backbone, tiny_collection, baselines))
    run = tmp_path / "tiny"
    assert list(table["systems"]) == ["encoder", "bm25", "teacher", "contrastive", "collective"]
    assert sorted(p.name for p in (run / "baselines").iterdir()) == ["bm25", "encoder"]
    assert json.loads((run / "compare" / "table.json").read_text()) == table
    markdown = (run / "compare" / "table.md").read_text()
    assert "## test (6 queries)" in markdown and "| collective |" in markdown
    assert not (run / "student").exists() and not list((run / "compare").rglob("*.arrow"))
    values = {}
    for name in ("contrastive", "collective"):
        folder = run / "compare" / f"{name}-5" / "evaluation"
        assert not (folder / "teacher.dev.run").exists() and not (folder / "table.json").exists()
        values[name] = json.loads((folder / "student.dev.per_query.json").read_text())["MRR@10"]
        cell = table["splits"]["dev"]["MRR@10"][name]
        assert cell["mean"] == pytest.approx(np.mean(list(values[name].values())))
        assert cell["low"] <= cell["mean"] <= cell["high"] and cell["seeds"] == [cell["mean"]]
    difference = table["splits"]["dev"]["MRR@10"]["collective"]
    gains = [values["collective"][q] - values["contrastive"][q] for q in values["contrastive"]]
    assert difference["difference_mean"] == pytest.approx(np.mean(gains))
    assert table["systems"]["collective"]["label_seconds"] > 0 == table["systems"]["contrastive"]["label_seconds"]
    _resumes(config(tmp_path, tiny_backbone, tiny_collection, baselines), run, table)
    without = run_compare(config(tmp_path, tiny_backbone, tiny_collection, baselines, "compare.bm25=false"))
    assert list(without["systems"]) == ["encoder", "teacher", "contrastive", "collective"]
    _against(run)
    _other_engine_and_own_passages(tmp_path, tiny_backbone, tiny_collection, run)


def _other_engine_and_own_passages(storage: Path, backbone: str, collection: str, run: Path) -> None:
    """The engine of section retrieve answers; one more is asked for where the query's own passage may be among them."""
    changes = ("evaluate.engine=retrieve", "retrieve.engine=faiss", "evaluate.skip_same_id=true", "evaluate.depth=50")
    context = RunContext.of(config(storage, backbone, collection, *changes))
    found = measure_system(context, "teacher", context.paths.embeddings, ["dev"], str(run / "other"))
    exact = json.loads((run / "compare" / "teacher" / "teacher.dev.per_query.json").read_text())
    assert found["dev"].per_query["nDCG@10"] == pytest.approx(exact["nDCG@10"])
    ranked = pq.read_table(run / "other" / "rankings" / "teacher" / "dev-000000.parquet")
    assert max(ranked["rank"].to_pylist()) == 51
    assert read_trec_run(str(run / "other" / "teacher.dev.run"))["rank"].max() == 50


def _resumes(again: Config, run: Path, table: dict) -> None:
    """Nothing is trained or measured a second time; a variant that is half gone alone is finished."""
    before = times(run)
    assert run_compare(again) == table
    changed = {name for name, when in times(run).items() if before.get(name) != when}
    assert {Path(name).name for name in changed} <= {"run.json", "table.json", "table.md"}
    os.remove(run / "compare" / "collective-5" / "evaluation" / "_manifest.json")
    run_compare(again)
    changed = {name for name, when in times(run).items() if before.get(name) != when}
    assert any(name.startswith("compare/collective-5/evaluation") for name in changed)
    changed = {name for name in changed if Path(name).name != "run.json"}  # written by every command
    kept = ("compare/contrastive", "compare/collective-5/student/", "labels")
    assert not [name for name in changed if name.startswith(kept)]


def _against(run: Path) -> None:
    """Two variants against each other, as `evaluate --against` does it."""
    mine, other = (
        Side.of(open_finished(str(run / "compare" / f"{n}-5")), "student") for n in ("collective", "contrastive")
    )
    found = compare_runs(other, mine)
    row = found["splits"]["test"]["nDCG@10"]
    assert row["difference_mean"] == pytest.approx(row["here"] - row["there"]) and row["queries"] == 6
    assert json.loads(Path(found["written"]).read_text())["here"]["run"].endswith("collective-5")
    lost = Side(other.run, "student", other.settings, {"test": {"nDCG@10": {"q30": 1.0, "q99": 1.0}}})
    with pytest.raises(UserError, match="1 in both, 5 only here, 1 only there"):
        compare_runs(Side(lost.run, "student", lost.settings, lost.per_query), mine)
    stricter = Side(other.run, "student", {**other.settings, "relevance_threshold": 2}, other.per_query)
    with pytest.raises(UserError, match="evaluated with different settings"):
        compare_runs(stricter, mine)
    deeper = Side(other.run, "student", {**other.settings, "depth": 10}, other.per_query)
    assert compare_runs(deeper, mine)["notes"] == ["evaluate.depth differs: 50 here, 10 there"]
    with pytest.raises(UserError, match="no evaluation of a teacher here"):
        Side.of(open_finished(str(run / "compare" / "collective-5")), "teacher")
