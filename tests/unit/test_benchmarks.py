"""The benchmarks' own arithmetic, by hand. None of them is run."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_ray.embed.encoder import TextEncoder
from ckd_ray.embed.stream import plan_shards
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.store import shard_name
from tests.evidence import store_of
from tests.support import WORDS


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_the_tenths_are_of_passages_whatever_the_shards_hold() -> None:
    from embed_growth import tenths

    # 100 passages, ten a second; the clock starts with the first shard, and a tenth is a quarter of the second one.
    assert tenths([(6.0, 10), (4.0, 40), (5.0, 10), (0.0, 40)]) == pytest.approx((10, 10))
    assert tenths([(0.0, 40), (4.0, 40), (5.0, 10), (7.0, 10)]) == pytest.approx((10, 5))  # the last took two seconds
    sizes = [stop - first for first, stop in plan_shards(1_000_000, "auto")]
    steady = zip(np.cumsum(sizes) / 4000, sizes, strict=True)
    assert len(set(sizes)) > 10 and tenths(list(steady)) == pytest.approx((4000, 4000))


def test_the_shards_of_a_store_have_their_times_and_passages(tmp_path: Path, tiny_backbone: str) -> None:
    from embed_growth import committed

    model = ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48))
    store = store_of(model, [WORDS[i] for i in range(7)], tmp_path, shard=3)
    for i, time in enumerate((50, 30, 40)):
        os.utime(tmp_path / shard_name(i), (time, time))
    assert committed(store) == [(50.0, 3), (30.0, 3), (40.0, 1)]


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_part_has_the_last_line_of_a_file_with_or_without_its_end(tmp_path: Path, end: str) -> None:
    from part import cut

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "collection.tsv").write_text("p0\tzero\n\np1\tone\np2\ttwo" + end)
    (source / "queries.train.tsv").write_text("q0\tzero\nq1\ttwo" + end)
    (source / "qrels.train.tsv").write_text("q0\t0\tp0\t1\nq1\t0\tp2\t1" + end)
    (source / "queries.test.tsv").write_text("")
    (source / "qrels.test.tsv").write_text("")
    assert cut(source, out, {"train": None, "test": None}) == {"train": 2, "test": 0, "passages": 2}
    assert (out / "collection.tsv").read_text() == "p0\tzero\np2\ttwo\n"


def test_the_padded_loop_takes_the_precision_that_it_is_given(tiny_backbone: str) -> None:
    from embed_rates import padded_loop

    model = ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)).eval()
    texts = [" ".join(WORDS[: 1 + i % 20]) for i in range(40)]
    rows_TD = TextEncoder(model).passages(model.tokenizer.passages(texts)).embeddings_TD.float()
    loops = {p: torch.cat(padded_loop(model, texts, torch.device("cpu"), p)).float() for p in ("fp32", "bf16")}
    assert torch.allclose(loops["fp32"], rows_TD, atol=2e-3)
    assert 0 < float((loops["bf16"] - loops["fp32"]).abs().max()) < 0.1
