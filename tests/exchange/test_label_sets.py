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
WIDTH = 6
# Library: the form of labels that is made for it.
FORMATS = {
    "pylate": "pylate",
    "sentence-transformers": "sentence-transformers",
    "flagembedding": "flagembedding",
    "tevatron": "tevatron",
    "colbert-ai": "colbert",
}


@pytest.mark.parametrize("library", list(FORMATS))
def test_ten_steps_on_exported_labels(library: str, tmp_path: Path, tiny_backbone: str, tiny_collection: str) -> None:
    run = labelled_run(tmp_path, tiny_backbone, tiny_collection)
    export_labels(run, FORMATS[library], out=str(tmp_path / "labels"), width=WIDTH, scaling="minmax")
    out = tmp_path / "said.json"
    ask(library, str(tmp_path / "labels"), tiny_backbone, str(out), script="train_on_labels.py")
    said = json.loads(out.read_text())
    print(said)
    assert said["steps"] == 10 and said["weights_changed"]
    assert len(said["losses"]) == 10 and all(math.isfinite(loss) for loss in said["losses"])
    assert len(set(said["losses"])) > 1
    query, labelled, scores = first_query(run, tmp_path / "lists")
    assert said["examples"] == 24 and said["seen"]["query"] == query
    seen = dict(zip(said["seen"]["passages"], said["seen"]["scores"], strict=True))
    assert seen == pytest.approx(scores, abs=1e-6) and len(seen) == WIDTH
    assert said["seen"]["passages"][0] == labelled


def first_query(run: str, folder: Path) -> tuple[str, str, dict[str, float]]:
    """The text of the first query, of its labelled passage, and the scores by the texts of all its candidates."""
    export_labels(run, "pylate", out=str(folder), width=WIDTH, scaling="minmax")
    row = pq.read_table(folder / "train.parquet").to_pylist()[0]
    texts = dict(zip(*pq.read_table(folder / "documents.parquet").to_pydict().values(), strict=True))
    queries = dict(zip(*pq.read_table(folder / "queries.parquet").to_pydict().values(), strict=True))
    passages = [texts[i] for i in row["document_ids"]]
    return queries[row["query_id"]], passages[0], dict(zip(passages, row["scores"], strict=True))
