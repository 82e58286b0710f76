"""Search engines themselves on our exports: their best passages and scores are ours. tests/exchange/run makes their
environments, in the folder CKD_RAY_EXCHANGE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_ray.data import Collection
from ckd_ray.files import sha256_of
from ckd_ray.search.export import export_stored
from ckd_ray.search.scan import scan
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.codec import CODEC_FILE, Residual, load_codec
from tests.exchange.test_libraries import ask
from tests.labelled import ranked_run, recode

pytestmark = pytest.mark.exchange
TOP = 10
Found = list[list[tuple[str, float]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> Path:
    """A run of 60 passages in 4 shards, fp16."""
    storage = tmp_path_factory.mktemp("served")
    ranked_run(storage, tiny_backbone, tiny_collection)
    return storage / "tiny"


def searched(engine: str, export: str, queries_BQD: torch.Tensor, folder: Path) -> Found:
    asked, out = folder / "queries.npy", folder / f"{engine}.json"
    np.save(asked, queries_BQD.float().numpy())
    environment = {"lancedb": "vector-databases", "qdrant": "vector-databases"}.get(engine, engine)
    ask(environment, engine, export, str(asked), str(out), script="in_search_engine.py")
    found: Found = json.loads(out.read_text())
    return found


def compare(run: Path, store: EmbeddingStore, queries_BQD: torch.Tensor, found: Found, bound: float) -> None:
    """The same passages with the same scores; where two of ours are closer than `bound`, either may come first."""
    collection, worst = Collection.open(str(run)), 0.0
    for rows, hits in zip(queries_BQD, found, strict=True):
        scores, passages = scan(store, rows, collection.num_passages)
        ours = dict(zip(collection.passage_ids(passages), scores.tolist(), strict=True))
        assert len({name for name, _ in hits}) == TOP
        for rank, (name, score) in enumerate(hits):
            worst = max(worst, abs(score - ours[name]))
            assert abs(score - ours[name]) < bound and ours[name] > scores[rank] - bound, (rank, name)
    print(f"\n  largest difference of a score: {worst:.2g}")


def queries_of(run: Path) -> torch.Tensor:
    """Eight queries, of which every second is shorter, as without augmentation."""
    store = EmbeddingStore.open(str(run / "embeddings" / "queries.train"))
    queries_BQD = store.gather(np.arange(8)).embeddings_TD.float().view(8, -1, store.dim)
    queries_BQD[::2, queries_BQD.shape[1] // 2 :] = 0
    return queries_BQD


@pytest.mark.parametrize("engine", ["lancedb", "qdrant"])
def test_a_vector_database_ranks_as_we_do(run: Path, tmp_path: Path, engine: str) -> None:
    export = export_stored(str(run), "vectors", "parquet", out=str(tmp_path / "vectors"), system="teacher")
    queries_BQD = queries_of(run)
    found = searched(engine, export["out"], queries_BQD, tmp_path)
    compare(run, EmbeddingStore.open(str(run / "embeddings" / "passages")), queries_BQD, found, 1e-3)


@pytest.mark.parametrize("codec", ["fp16", "residual1", "residual2", "residual4"])
def test_fast_plaid_ranks_as_we_do(run: Path, tmp_path: Path, codec: str) -> None:
    """From a store of that codec; from fp16 with codes of 4 bits that the export learns. It scores in fp16."""
    mine = tmp_path / "tiny"
    shutil.copytree(run, mine)
    passages = mine / "embeddings" / "passages"
    if codec != "fp16":
        recode(passages, codec)
    written = export_stored(str(mine), "index", "fast-plaid", out=str(tmp_path / "index"), system="teacher")
    assert written["bits"] == {"residual1": 1, "residual2": 2}.get(codec, 4)
    if codec == "fp16":
        uri = tmp_path / "index" / CODEC_FILE
        learned = load_codec("residual4", written["dim"], str(uri.parent), sha256_of(str(uri)))
        assert isinstance(learned, Residual)
        recode(passages, "residual4", learned)
    queries_BQD = queries_of(run)
    found = searched("fast-plaid", written["out"], queries_BQD, tmp_path)
    compare(run, EmbeddingStore.open(str(passages)), queries_BQD, found, 0.05)
