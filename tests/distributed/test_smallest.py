"""The smallest collection there is: one passage, one query. The whole job ends well, with the figures it must have."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ckd_ray.checks import load_config
from ckd_ray.pipeline.runner import run_stages
from tests.support import WORDS, overrides


@pytest.mark.soak
@pytest.mark.usefixtures("ray_session")
def test_one_passage_and_one_query(tmp_path: Path, tiny_backbone: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "collection.tsv").write_text(f"p\t{' '.join(WORDS[:9])}\n")
    for split in ("train", "dev"):
        (folder / f"queries.{split}.tsv").write_text(f"q-{split}\t{WORDS[3]}\n")
        (folder / f"qrels.{split}.tsv").write_text(f"q-{split}\t0\tp\t1\n")
    values = overrides(tmp_path, tiny_backbone, str(folder), "teacher.steps=2", "distill.steps=2")
    reports = run_stages(load_config(None, values))
    assert [r.name for r in reports][-1] == "evaluate"
    run = tmp_path / "tiny"
    assert pq.read_table(run / "rankings" / "train-000000.parquet")["passage_id"].to_pylist() == ["p"]
    assert pq.read_table(run / "labels" / "train-000000.parquet")["feedback_ids"].to_pylist() == [["p"]]
    measures = json.loads((run / "evaluation" / "measures.json").read_text())
    assert measures["splits"]["dev"]["student"]["MRR@10"] == 1.0
    # There is nothing to tell apart: the loss is 0 from the first step on, and finite.
    assert [r.figures["first_loss"] for r in reports if r.name in ("teacher", "distill")] == [0.0, 0.0]
