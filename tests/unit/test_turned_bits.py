"""A bit that turns in a file of a run is found when the file is read, or changes nothing that is read."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckd_ray.data import Collection
from ckd_ray.errors import JobError, UserError
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.ray_util.parts import part_file
from ckd_ray.retrieve.rankings import read_ranking_part
from tests.labelled import with_rankings
from tests.support import flip_bit

# The header of a page has no checksum either; damage of it is found as a page that does not fit, by other errors.
ERRORS = (JobError, OSError, ValueError, KeyError)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> Path:
    return Path(with_rankings(tmp_path_factory.mktemp("turned"), tiny_backbone, tiny_collection))


def texts(run: Path) -> object:
    return Collection.open(str(run)).texts(range(60))


def queries(run: Path) -> object:
    return Collection.open(str(run)).queries("train")


def qrels(run: Path) -> object:
    return [np.asarray(column).tolist() for column in vars(Collection.open(str(run)).qrels("train")).values()]


def ranking(run: Path) -> object:
    table = read_ranking_part(str(run / "rankings" / part_file("train", 0)))
    return {name: table[name].to_pylist() for name in ("query_index", "passage_index", "rank", "score", "passage_id")}


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("corpus/part-00000.parquet", texts),
        ("queries/train.parquet", queries),
        ("queries/_qrels/train.parquet", qrels),
        ("rankings/train-000000.parquet", ranking),
    ],
)
def test_a_turned_bit_of_a_table_is_found_or_harmless(run: Path, file: str, read: Callable[[Path], Any]) -> None:
    path = run / file
    written, wanted, named = path.read_bytes(), read(run), 0
    footer = len(written) - 8 - int.from_bytes(written[-8:-4], "little")  # a footer has no checksum in this format
    places = random.Random(3).sample(range(4, footer), min(300, footer - 4))
    try:
        for at in places:
            path.write_bytes(written)
            flip_bit(path, at, at % 8)
            try:
                assert read(run) == wanted, f"byte {at} of {len(written)}"
            except ERRORS as error:
                wording = rf"{path.name}: the file is not what was written.*same command again"
                named += bool(re.search(wording, str(error)))
    finally:
        path.write_bytes(written)
    assert named > 50  # most of the bytes are in pages
    assert read(run) == wanted


@pytest.mark.parametrize("file", ["model.safetensors", "projection.safetensors"])
def test_a_turned_bit_of_a_checkpoint_is_found(tmp_path: Path, tiny_backbone: str, file: str) -> None:
    folder = tmp_path / "m"
    ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=8, query_maxlen=8, doc_maxlen=16), seed=1).save(folder)
    ColBERT.from_pretrained(folder)
    flip_bit(folder / file, (folder / file).stat().st_size - 5)  # of a weight's last digits
    with pytest.raises(UserError, match=rf"{file}.*the weights of the checkpoint are not those that were saved"):
        ColBERT.from_pretrained(folder)
