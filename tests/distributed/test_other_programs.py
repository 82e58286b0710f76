"""A run as other programs see it: folders of Parquet files are tables, as they are. And runs of earlier versions."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from ckd_ray.data import Collection
from ckd_ray.inspection.labelled_run import LabelledRun
from ckd_ray.runs.artifact import fingerprint_of, is_made, make, manifest_of, remove_altered
from ckd_ray.runs.directory import RunDir
from tests.labelled import labelled_run

PAGES = Path(__file__).parents[2] / "docs" / "how-to"
TABLES = {
    "corpus": (60, ["passage_id", "text"]),
    "queries": (36, ["query_id", "text", "split"]),
    "queries/_qrels": (36, ["query_index", "passage_index", "query_id", "passage_id", "relevance"]),
    "rankings": (24 * 20, ["query_id", "passage_id", "rank", "score", "query_index", "passage_index"]),
    "labels": (24, ["query_id", "feedback_ids", "expansion", "idf", "token_ids"]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> Path:
    """A labelled run of 60 passages and 24 training queries, 6 for dev and 6 for test."""
    return Path(labelled_run(tmp_path_factory.mktemp("shown"), tiny_backbone, tiny_collection))


def _duckdb(folder: str) -> pd.DataFrame:
    duckdb = pytest.importorskip("duckdb")
    return duckdb.sql(f"SELECT * FROM '{folder}/*.parquet'").df()


def _polars(folder: str) -> pd.DataFrame:
    return pd.DataFrame(pytest.importorskip("polars").read_parquet(f"{folder}/*.parquet").to_dicts())


def _ray(folder: str) -> pd.DataFrame:
    import ray

    return ray.data.read_parquet(folder).to_pandas()


def _spark(folder: str) -> pd.DataFrame:
    sql = pytest.importorskip("pyspark.sql")
    session = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        return pd.DataFrame([row.asDict() for row in session.read.parquet(folder).collect()])
    finally:
        session.stop()


READERS: dict[str, Callable[[str], pd.DataFrame]] = {
    "pandas": pd.read_parquet,
    "pyarrow": lambda folder: pads.dataset(folder).to_table().to_pandas(),
    "duckdb": _duckdb,
    "polars": _polars,
    "ray": _ray,
    "spark": _spark,
}


@pytest.fixture
def mine(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place where the pages' `runs/mine` is `run`, with the teacher as its student."""
    place = tmp_path / "runs" / "mine"
    place.mkdir(parents=True)
    for entry in run.iterdir():
        (place / entry.name).symlink_to(entry)
    (place / "student").symlink_to(run / "teacher")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("program", READERS)
def test_folders_are_tables(run: Path, ray_session: None, program: str) -> None:
    found = {name: READERS[program](str(run / name)) for name in TABLES}
    for name, (rows, columns) in TABLES.items():
        assert (len(found[name]), list(found[name].columns)) == (rows, columns), name
    collection = Collection.open(str(run))
    texts = dict(zip(found["corpus"]["passage_id"], found["corpus"]["text"], strict=True))
    assert texts == dict(zip(collection.passage_ids(range(60)), collection.texts(range(60)), strict=True))
    asked = found["queries"]
    for split in collection.splits:
        assert set(asked[asked["split"] == split]["query_id"]) == set(collection.queries(split).ids)
    opened = LabelledRun.open(str(run))
    row = found["labels"].set_index("query_id").loc["q7"]
    vectors, weights = opened.expansions.select(np.array([7]), 8, 1.0)
    count = len(row["idf"])
    assert np.array_equal(np.stack(list(row["expansion"])), vectors[0, :count].numpy())
    assert np.array_equal(np.asarray(row["idf"], np.float32), weights[0, :count].numpy())
    best = found["rankings"].query("query_id == 'q7' and rank == 1")["passage_id"].item()
    assert best == collection.passage_ids([int(opened.rankings[7][0])])[0] == row["feedback_ids"][0]


def as_before(run: Path) -> None:
    """Give the files of a run the names that schema 2 had."""
    for path in sorted(run.rglob("_*"), reverse=True):
        if path.name == "_rows":
            for array in path.iterdir():
                array.rename(path.parent / array.name)
            path.rmdir()
        elif path.name == "_qrels":
            for table in path.iterdir():
                table.rename(path.parent / f"{table.stem}.qrels.parquet")
            path.rmdir()
        else:
            path.rename(path.with_name(path.name[1:]))
    for path in run.rglob("manifest.json"):
        text = path.read_text().replace("_ids.arrow", "ids.arrow")
        for split in ("train", "dev", "test"):
            text = text.replace(f"_qrels/{split}.parquet", f"{split}.qrels.parquet").replace(f"_rows/{split}", split)
        path.write_text(text)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "schema": 2}))


def test_a_run_with_the_former_names_is_read_and_gone_on_with(run: Path, tmp_path: Path) -> None:
    now, old = LabelledRun.open(str(run)), tmp_path / "old"
    shutil.copytree(run, old)
    as_before(old)
    names = {path.relative_to(old).as_posix() for path in old.rglob("*")}
    assert {"corpus/manifest.json", "corpus/ids.arrow", "queries/train.qrels.parquet", "rankings/train.npy"} <= names
    assert "labels/train-000000.npy" in names and not any(part.startswith("_") for n in names for part in n.split("/"))
    then = LabelledRun.open(str(old))
    assert then.collection.passage_ids([3, 59]) == now.collection.passage_ids([3, 59])
    assert np.array_equal(then.rankings, now.rankings)
    assert np.array_equal(then.positives.of(5), now.positives.of(5))
    for a, b in zip(*(opened.expansions.select(np.arange(24), 8, 1.0) for opened in (then, now)), strict=True):
        assert bool((a == b).all())
    paths = RunDir(str(old))
    assert manifest_of(paths.labels) and is_made(paths.corpus, str(fingerprint_of(paths.corpus)))
    assert is_made(paths.teacher, str(fingerprint_of(paths.teacher))) and not remove_altered(paths.queries)

    # What is made again has the new names alone.
    def work() -> dict[str, Any]:
        assert sorted(p.name for p in (old / "teacher").glob("*m*i*.json")) == ["_making.json"]
        shutil.copy(run / "teacher" / "config.json", old / "teacher")
        return {"again": True}

    (old / "teacher" / "config.json").write_text("cut")
    assert make(paths.teacher, made_of := str(fingerprint_of(paths.teacher)), work)
    assert (manifest_of(paths.teacher) or {})["again"] and is_made(paths.teacher, made_of)
    assert not {"manifest.json", "making.json", "_making.json"} & {p.name for p in (old / "teacher").iterdir()}


def test_the_vectors_have_a_fixed_size(run: Path) -> None:
    kind = pads.dataset(str(run / "labels")).schema.field("expansion").type
    assert kind == pa.list_(pa.list_(pa.float32(), 16))


def test_the_programs_on_the_page_run(mine: None, ray_session: None) -> None:
    """Lines with a program that is not installed, and that with Spark, are left out."""
    reading, spark = _python(PAGES / "read-a-run.md")
    assert "spark.read.parquet" in spark
    # The tasks of this Ray work in another folder.
    first, *lines = reading.replace("runs/mine", str(Path("runs/mine").absolute())).splitlines()
    imports = [f"import {module}" for module in first.removeprefix("import ").split(", ")]
    missing = [line.split()[-1] for line in imports if find_spec(line.split()[1].split(".")[0]) is None]
    assert set(missing) <= {"duckdb", "pl"}
    names: dict[str, Any] = {}
    for line in [*imports, *lines]:
        if not any(re.search(rf"\b{name}\b", line) for name in missing):
            exec(line, names)
    assert (len(names["labels"]), names["corpus"].count_rows(), names["queries"].count()) == (24, 60, 36)
    assert all(len(names[name]) == rows for name, rows in (("best", 24), ("rankings", 480)) if name in names)


def test_the_student_on_the_pages_answers(mine: None) -> None:
    names: dict[str, Any] = {}
    (scoring,) = _python(PAGES / "search-and-serve.md")
    exec(scoring, names)
    assert names["scores"].shape == (1, 2) and bool(names["scores"].isfinite().all())
    encoding = _python(PAGES / "search-engines.md")[0]
    exec(encoding.replace("-1, 128)", "-1, 16)"), names)
    (rows,) = names["rows"]
    assert rows.shape[1] == 16 and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)


def _python(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
