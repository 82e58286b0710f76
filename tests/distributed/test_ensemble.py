"""The ensemble stage in a whole small run: its scores are the literal ones, and training adds them to the teacher's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ckd_ray.checks import load_config
from ckd_ray.data import Collection
from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.step import TrainingStep
from ckd_ray.distill.task import TrainingTask
from ckd_ray.ensemble.reader import EnsembleReader
from ckd_ray.evaluate.bm25 import rank_bm25
from ckd_ray.inspection.labelled_run import LabelledRun
from ckd_ray.model import ColBERT
from ckd_ray.model.pooled import PooledModel
from ckd_ray.ray_util.parts import part_file
from ckd_ray.retrieve.rankings import read_ranking_part
from tests.finished import Finished


@pytest.fixture(scope="session")
def run(finished_run: Finished) -> Path:
    """The run that all share."""
    return finished_run.run


def _pairs(run: Path, scorer: str) -> dict[tuple[str, str], float]:
    rows = [r for p in sorted((run / "ensemble" / scorer).glob("*.parquet")) for r in pq.read_table(p).to_pylist()]
    return {(r["query_id"], r["passage_id"]): r["score"] for r in rows}


def test_the_encoder_s_scores_are_cosines_of_its_pooled_vectors(run: Path, finished_run: Finished) -> None:
    collection, pairs = Collection.open(str(run)), _pairs(run, "encoder")
    model = PooledModel.from_backbone(finished_run.backbone).eval()
    queries, texts = collection.queries("train"), dict(zip(*_corpus(collection), strict=True))
    assert len(pairs) >= len(queries.ids) * 5
    for (query, passage), score in list(pairs.items())[::37]:
        with torch.no_grad():
            asked = queries.texts[queries.ids.index(query)]
            vectors = [_vector(model, text) for text in (asked, texts[passage])]
        assert score == pytest.approx(float(vectors[0] @ vectors[1]), abs=2e-3)  # kept as fp16


def _vector(model: PooledModel, text: str) -> torch.Tensor:
    rows, _ = model.encode_passages(*model.tokenizer.pad(model.tokenizer.passages([text])))
    return rows.reshape(-1)


def _corpus(collection: Collection) -> tuple[list[str], list[str]]:
    everything = np.arange(collection.num_passages)
    return collection.passage_ids(everything), collection.texts(everything)


def test_bm25_s_scores_are_those_of_its_ranking(run: Path, tmp_path: Path) -> None:
    pairs = _pairs(run, "bm25")
    rank_bm25(str(run), ["train"], str(tmp_path), 200)
    table = read_ranking_part(str(tmp_path / part_file("train", 0))).to_pylist()
    ranked = {(r["query_id"], r["passage_id"]): r["score"] for r in table}
    assert {pair: pytest.approx(score, abs=1e-4) for pair, score in pairs.items()} == {
        pair: ranked.get(pair, 0.0) for pair in pairs
    }


def test_a_step_adds_the_weighted_scores_to_those_of_the_teacher(run: Path) -> None:
    config = json.loads((run / "run.json").read_text())["config"]
    settings = load_config(None, []).distill.model_copy(
        update={"steps": 2, "batch_size": 4, "negatives": 3, "encoder_share": 0.25, "bm25_share": 0.25, "workers": 1}
        | {"negatives_depth": config["distill"]["negatives_depth"]}
    )
    task = TrainingTask("distill", str(run), str(run / "teacher"), "x", 17, settings)
    model = ColBERT.from_pretrained(run / "teacher")
    reader = InputReader(task, model.tokenizer)
    inputs, batch = reader.read(0), reader.plan.batch(0)
    ids, _ = _corpus(reader.collection)
    factors = dict(zip(("encoder", "bm25"), reader.ensemble.factors, strict=True)) if reader.ensemble else {}
    scores = {name: _pairs(run, name) for name in factors}
    queries = reader.collection.queries("train").ids
    flat = batch.passages_BM.reshape(-1).tolist()
    assert inputs.ensemble_BN is not None and inputs.scored_BN is not None
    for row, query in enumerate(batch.queries_B.tolist()):
        own = range(row * 4, row * 4 + 4)
        assert all(bool(inputs.scored_BN[row, column]) for column in own)
        for column, passage in enumerate(flat):
            pair = (queries[query], ids[passage])
            wanted = sum(factor * scores[name].get(pair, 0.0) for name, factor in factors.items())
            assert float(inputs.ensemble_BN[row, column]) == pytest.approx(wanted, abs=1e-3)
    with_ensemble = float(TrainingStep(model, task, "fp32", scale=2.0)(inputs))
    inputs.ensemble_BN = None
    assert with_ensemble != pytest.approx(float(TrainingStep(model, task, "fp32", scale=2.0)(inputs)), abs=1e-6)


def test_a_scorer_that_the_stage_left_out_is_left_out(run: Path, tmp_path: Path) -> None:
    weights = json.loads((run / "ensemble" / "weights.json").read_text())
    del weights["scorers"]["encoder"]
    (tmp_path / "weights.json").write_text(json.dumps(weights))
    (tmp_path / "bm25").symlink_to(run / "ensemble" / "bm25")
    settings = load_config(None, ["distill.bm25_share=0.3"]).distill
    reader = EnsembleReader.open(str(tmp_path), settings, ("encoder", "bm25"))
    assert len(reader.readers) == 1


def test_inspect_shows_the_targets_of_training(run: Path) -> None:
    """The collective scores have the ensemble's part."""
    opened = LabelledRun.open(str(run))
    opened.settings = opened.settings.model_copy(update={"encoder_share": 0.3})  # the fit to so few labels may give 0
    passages = opened.with_labelled(3, opened.rankings[3][:10])
    assert opened.ensemble is not None
    further, _ = opened.ensemble.of_batch(np.array([3]), passages)
    found = opened.distributions(3, passages).collective_scores
    opened.ensemble = None
    assert torch.allclose(found, opened.distributions(3, passages).collective_scores + further[0], atol=1e-4)
    assert float(further.std()) > 0
