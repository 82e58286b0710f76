"""Training reads the first `doc_maxlen` tokens of a passage of its section; the model itself keeps its own limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckd_ray.config.schema import DistillConfig
from ckd_ray.data import Collection
from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.scale import measured_scale
from ckd_ray.distill.task import TrainingTask
from ckd_ray.model import ColBERT
from tests.labelled import ranked_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> Path:
    """A ranked run."""
    storage = tmp_path_factory.mktemp("lengths")
    ranked_run(storage, tiny_backbone, tiny_collection)
    return storage / "tiny"


def reader(run: Path, model: ColBERT, doc_maxlen: int | None) -> InputReader:
    settings = DistillConfig(
        objective="contrastive", steps=1, batch_size=4, negatives=3, negatives_depth=15, doc_maxlen=doc_maxlen
    )
    return InputReader(TrainingTask("distill", str(run), str(run / "teacher"), "f", 17, settings), model.tokenizer)


def longest(of: InputReader) -> int:
    return max(ids.shape[1] for part in of.read(0).parts for ids, _ in part.groups)


def test_training_cuts_passages_at_its_own_limit(run: Path) -> None:
    model = ColBERT.from_pretrained(run / "teacher")
    limit = model.settings.doc_maxlen
    whole = longest(reader(run, model, None))
    assert 12 < whole <= limit
    assert longest(reader(run, model, 12)) == 12
    assert longest(reader(run, model, 10 * limit)) == whole  # never more than the model's


def test_a_cut_passage_is_the_beginning_and_the_end_marker(run: Path) -> None:
    tokenizer = ColBERT.from_pretrained(run / "teacher").tokenizer
    texts = [max(Collection.open(str(run)).texts(range(60)), key=len)]
    (whole,), (cut,) = tokenizer.passages(texts), tokenizer.passages(texts, 12)
    assert len(whole) > 12 == len(cut)
    assert np.array_equal(cut[:-1], whole[:11]) and cut[-1] == whole[-1] == tokenizer.sep_id


def test_the_scale_is_measured_on_passages_of_the_training_s_length(run: Path) -> None:
    model = ColBERT.from_pretrained(run / "teacher")
    inputs = reader(run, model, None)
    scales = [
        measured_scale(
            model, inputs.collection, inputs.positives, trained=False, seed=1, precision="fp32", doc_maxlen=n
        )
        for n in (None, model.settings.doc_maxlen, 8)
    ]
    assert scales[0] == scales[1] != scales[2]
