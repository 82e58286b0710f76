"""The libraries themselves train on exported labels. tests/exchange/run makes their environments."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ckd_ray.inspection.export_labels import export_labels
from tests.exchange.test_libraries import ask
from tests.labelled import labelled_run

pytestmark = pytest.mark.exchange


@pytest.mark.parametrize("library", ["pylate", "sentence-transformers"])
def test_ten_steps_on_exported_labels(library: str, tmp_path: Path, tiny_backbone: str, tiny_collection: str) -> None:
    run = labelled_run(tmp_path, tiny_backbone, tiny_collection)
    export_labels(run, library, out=str(tmp_path / "labels"), width=6)
    out = tmp_path / "said.json"
    ask(library, str(tmp_path / "labels"), tiny_backbone, str(out), script="train_on_labels.py")
    said = json.loads(out.read_text())
    print(said)
    assert said["steps"] == 10 and said["weights_changed"]
    assert len(said["losses"]) == 10 and all(math.isfinite(loss) for loss in said["losses"])
    first = pq.read_table(tmp_path / "labels" / "train.parquet")["scores"][0].as_py()
    assert said["seen"] == pytest.approx(first, abs=1e-6)
