"""The package in Python: the examples of the page, one after the other, on a tiny run; and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.dataset as pads
import pytest
import yaml

import ckd_ray
from ckd_ray.checks import load_config
from ckd_ray.config import ConfigError
from ckd_ray.errors import UserError
from ckd_ray.files import read_json
from ckd_ray.model import ColBERT
from tests.finished import Finished
from tests.here import in_this_process
from tests.support import tensorboard_events

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "python.md"


def test_the_import_is_quick_and_brings_no_library_along() -> None:
    code = (
        "import sys, ckd_ray\n"
        "assert {'train', 'open', 'Run'} <= set(dir(ckd_ray))\n"
        "print(sorted({'ray', 'torch', 'pandas', 'pyarrow', 'pydantic'} & set(sys.modules)))\n"
        "try: ckd_ray.tarin\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\nmodule 'ckd_ray' has no attribute 'tarin'\n"


@pytest.fixture(scope="module")
def examples(ray_session: None, tmp_path_factory: pytest.TempPathFactory, finished_run: Finished) -> dict[str, Any]:
    """The names of the page's examples after all of them have run in a folder with `config.yaml`.

    The first training finds everything done, as the run is a copy of the one that all share; the second trains."""
    folder, before = tmp_path_factory.mktemp("python"), Path.cwd()
    finished_run.copy(folder / "runs").rename(folder / "runs" / "mine")
    values = finished_run.values(Path("runs"), "run.name=mine", "distill.steps=4")
    config = load_config(None, values).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    os.chdir(folder)
    student = Path("runs", "mine", "student", "model.safetensors")
    try:
        was = student.read_bytes()
        with in_this_process():
            for block in blocks:
                exec(compile(block, PAGE.name, "exec"), names)
                names.setdefault("first", names["run"])
        assert student.read_bytes() != was
    finally:
        os.chdir(before)
    return {**names, "folder": folder}


def test_the_keywords_win_over_the_file_and_the_dictionary(examples: dict[str, Any]) -> None:
    first, run = examples["first"], examples["run"]
    assert first.config["distill"]["steps"] == 6 and first.config["distill"]["temperature"] == "auto"
    assert run.config["distill"]["steps"] == 6 and run.config["distill"]["temperature"] == 0.5
    assert first.folder == run.folder == str(examples["folder"] / "runs" / "mine") and run.name == "mine"
    assert repr(run) == f"ckd_ray.open({run.folder!r})"
    trained = read_json(f"{run.folder}/student/training.json")["settings"]
    assert trained["temperature"] == 0.5 and trained["steps"] == 6


def test_the_measures_are_those_of_the_files(examples: dict[str, Any]) -> None:
    run, means = examples["run"], examples["means"]
    by_split = read_json(f"{run.folder}/evaluation/measures.json")["splits"]
    assert set(means.columns) == {"encoder", "bm25", "teacher", "student"} and len(means) == 6
    for split, systems in by_split.items():
        for system, measures in systems.items():
            for measure, mean in measures.items():
                assert means.loc[(split, measure), system] == pytest.approx(mean)
    row = run.measures.loc["test", "nDCG@10", "teacher"]
    assert row["low"] <= row["mean"] <= row["high"] and row["queries"] == 6 and 0 < row["p"] <= 1
    mine = run.measures.loc["test", "nDCG@10", "student"]
    assert mine["mean"] - row["mean"] == pytest.approx(row["student_minus"]) and pd.isna(mine["p"])


def test_the_trackers_are_told_of_both_trainings_and_of_the_measures(examples: dict[str, Any]) -> None:
    run = examples["run"]
    folder = Path(run.folder) / "tracking"
    found = tensorboard_events(folder / "tensorboard")
    recorded = {role: json_lines(Path(run.folder) / role / "metrics.jsonl") for role in ("teacher", "student")}
    assert found["teacher/loss"] == [(r["step"], pytest.approx(r["loss"])) for r in recorded["teacher"]]
    assert len(recorded["teacher"]) == 4 and len(recorded["student"]) == 6
    for name in ("loss", "learning_rate"):  # the second student's after the first one's
        assert found[f"distill/{name}"][6:] == [(r["step"], pytest.approx(r[name])) for r in recorded["student"]]
        assert [step for step, _ in found[f"distill/{name}"]] == [*range(6), *range(6)]
    dev = [(r["step"], pytest.approx(r["mrr@10"])) for r in recorded["student"] if "mrr@10" in r]
    assert found["distill/mrr_10"][2:] == dev and [step for step, _ in dev] == [2, 5]
    measured = found["evaluate/test/student/nDCG_10"]
    assert len(measured) == 2 and measured[1] == (
        0,
        pytest.approx(examples["means"].loc[("test", "nDCG@10"), "student"]),
    )
    assert "evaluate/dev/bm25/MRR_10" in found
    assert read_json(str(folder / "tensorboard.json"))["config"]["distill"]["temperature"] == 0.5


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labels_are_what_inspect_shows(examples: dict[str, Any]) -> None:
    from ckd_ray.inspection.inspect import inspect_query

    run = examples["run"]
    (label,) = run.labels("q3", top=5)
    shown = inspect_query(run.folder, "q3", 5)
    assert label["expansion"] == shown["expansion"] and label["settings"] == shown["settings"]
    kept = [key for key in shown["passages"][0] if key != "text"]
    assert [[p[k] for k in kept] for p in label["passages"]] == [[p[k] for k in kept] for p in shown["passages"]]
    assert any(p["text"].endswith(" ...") for p in shown["passages"])
    assert not any(p["text"].endswith(" ...") for p in label["passages"])
    assert [found["query_id"] for found in run.labels()] == [f"q{i}" for i in range(24)]
    with pytest.raises(UserError, match=r"no such query(.|\n)*nearest: q3"):
        run.labels(["q3", "q3x"])


def test_search_models_exports_and_the_report(examples: dict[str, Any]) -> None:
    run, folder = examples["run"], examples["folder"]
    assert [hit.rank for hit in examples["hits"]] == [1, 2, 3]
    assert [hit.score for hit in run.search("banel", 2, system="teacher")] != [h.score for h in run.search("banel", 2)]
    assert isinstance(run.student, ColBERT) and isinstance(run.teacher, ColBERT) and run.student is run.student
    assert examples["scores"].shape == (1, 2)
    assert (folder / "mine-pylate" / "modules.json").exists()
    assert len((folder / "mine-labels" / "train.jsonl").read_text().splitlines()) == 24 * 7
    assert "<html" in (folder / "mine.html").read_text()
    for call in (
        lambda: run.search("banel", system="peer"),
        lambda: run.search("  "),
        lambda: run.search("banel", 0),
        lambda: run.export(format="pylate", what="everything"),
    ):
        with pytest.raises(UserError):
            call()


def test_vectors_and_an_index_are_exported_and_pushed(
    examples: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pads.dataset(examples["folder"] / "mine-vectors" / "data").to_table()
    assert table.column_names == ["id", "text", "vectors"] and table.num_rows == 60
    pushed = list[tuple[str, str, str]]()
    monkeypatch.setattr("ckd_ray.api.run.check_repository", lambda repo: pushed.append((repo, "", "")))
    monkeypatch.setattr("ckd_ray.api.run.push_folder", lambda *given: pushed.append(given) or "where it is")
    options = {"format": "fast-plaid", "what": "index", "model": "teacher", "bits": 2, "push": "me/index"}
    written = examples["run"].export(tmp_path / "index", **options)
    assert written["pushed"] == "where it is"
    assert pushed == [("me/index", "", ""), (str(tmp_path / "index"), "me/index", "index")]
    assert written["model"] == "teacher" and written["bits"] == 2 and (tmp_path / "index" / "ivf.npy").exists()


def test_what_is_missing_is_said(examples: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        ckd_ray.open(tmp_path)
    (tmp_path / "run.json").write_text((Path(examples["run"].folder) / "run.json").read_text())
    bare = ckd_ray.open(tmp_path)
    for ask in (
        lambda: bare.measures,
        lambda: bare.labels(),
        lambda: bare.search("banel"),
        lambda: bare.student,
        lambda: bare.export(format="pylate"),
    ):
        with pytest.raises(UserError):
            ask()


def test_mistakes_are_errors_of_ours_and_nothing_starts(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"teacher.steps: (.|\n)*distill.stepz: unknown key; did you mean distill.steps\?"
    ):
        ckd_ray.train({"distill": {"stepz": 5}}, **{"teacher.steps": "many"})
    with pytest.raises(UserError, match="no value of a configuration"):
        ckd_ray.train(distill={"steps": object()})
    with pytest.raises(UserError, match="no job is sent from Python"):
        ckd_ray.train(cluster="http://head:8265")
    with pytest.raises(UserError, match="unknown stage"):
        ckd_ray.train(until="lable")
    with pytest.raises(UserError, match="cannot be read"):
        ckd_ray.train(tmp_path / "none.yaml")


def test_a_ray_of_the_caller_is_kept_and_no_other_is_started(ray_session: None) -> None:
    import ray
    from ray.data import DataContext

    from ckd_ray.ray_util.session import connected

    context = DataContext.get_current()
    context.enable_progress_bars = True
    try:
        with connected(None):
            assert not DataContext.get_current().enable_progress_bars
        assert ray.is_initialized() and DataContext.get_current().enable_progress_bars
    finally:
        DataContext.get_current().enable_progress_bars = False
    with pytest.raises(UserError, match="connected to a Ray already"), connected("local"):
        pass


@pytest.mark.parametrize(
    "call",
    [
        "from ckd_ray.ray_util.token import use_token as use",
        "from types import SimpleNamespace\nfrom ckd_ray.jobs.launcher import use_launcher_s_token\n"
        "def use():\n    use_launcher_s_token(SimpleNamespace(token_source=None))",
    ],
    ids=["token", "launcher"],
)
def test_a_program_that_has_imported_ray_before_uses_the_token(call: str, tmp_path: Path) -> None:
    code = (
        "import ray\nfrom ray._raylet import get_authentication_mode as mode\n"
        f"{call}\nbefore = mode()\nuse()\nprint(before, mode())\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"}
    environment |= {"RAY_AUTH_TOKEN": "0" * 64, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "0 1\n"
