"""Token embeddings for other search engines: Parquet, and the files of fast-plaid against a literal reading of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from ckd_ray.data import Collection
from ckd_ray.errors import UserError
from ckd_ray.files import arrays, write_atomic
from ckd_ray.search import fast_plaid, vectors
from ckd_ray.search.export import export_stored
from ckd_ray.store import EmbeddingStore
from tests.labelled import ranked_run, recode


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> Path:
    """A run of 60 passages in 4 shards, fp16."""
    storage = tmp_path_factory.mktemp("served")
    ranked_run(storage, tiny_backbone, tiny_collection)
    return storage / "tiny"


def passages(run: Path) -> EmbeddingStore:
    return EmbeddingStore.open(str(run / "embeddings" / "passages"))


def export(run: Path, what: str, fmt: str, out: Path | str | None, **more: Any) -> dict[str, Any]:
    return export_stored(str(run), what, fmt, out=None if out is None else str(out), system="teacher", **more)


@pytest.mark.parametrize("place", ["{}", "file://{}"])
def test_parquet_holds_every_passage(run: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_ROWS_A_BLOCK", 64)
    written = export(run, "vectors", "parquet", place.format(tmp_path / "out"))
    store, collection = passages(run), Collection.open(str(run))
    assert written["passages"] == 60 and written["tokens"] == store.num_tokens and written["model"] == "teacher"
    table = pads.dataset(tmp_path / "out" / "data").to_table()
    assert table.schema.field("vectors").type == pa.list_(pa.list_(pa.float16(), 16))
    assert table["id"].to_pylist() == collection.passage_ids(range(60))
    assert table["text"].to_pylist() == collection.texts(range(60))
    rows = table["vectors"].combine_chunks()
    read = store.gather(np.arange(60))
    assert np.array_equal(np.diff(rows.offsets.to_numpy()), read.lengths)
    flat = rows.flatten().flatten().to_numpy().reshape(-1, 16)
    assert np.array_equal(flat.view(np.uint16), read.embeddings_TD.numpy().view(np.uint16))
    # Blocks are bounded: a row group ends with the passage that crosses the bound.
    group = pq.ParquetFile(tmp_path / "out" / "data" / "part-000000.parquet").metadata
    longest = int(read.lengths.max())
    assert group.num_row_groups > 2
    assert all(group.row_group(i).column(2).num_values <= 16 * (64 + longest) for i in range(group.num_row_groups))


@pytest.mark.parametrize(("what", "fmt", "writes"), [("vectors", "parquet", 3), ("index", "fast-plaid", 11)])
def test_a_stopped_export_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, fmt: str, writes: int
) -> None:
    """Stopped in its third part."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    written = export(run, what, fmt, whole)
    done = list[str]()

    def stop_late(uri: str, write: Any) -> int:
        if len(done) == writes - (what == "vectors"):
            raise KeyboardInterrupt
        done.append(uri)
        return write_atomic(uri, write)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        for module in (vectors, fast_plaid, arrays):
            patched.setattr(module, "write_atomic", stop_late)
        export(run, what, fmt, half)
    first = half / ("data/part-000000.parquet" if what == "vectors" else "0.codes.npy")
    kept = first.stat().st_mtime_ns
    assert not (half / "_manifest.json").exists() and not list(half.rglob("*2*"))
    assert export(run, what, fmt, half) == {**written, "out": str(half)}
    assert first.stat().st_mtime_ns == kept
    for path in whole.rglob("*"):
        if path.is_file() and path.name != "_manifest.json":
            assert (half / path.relative_to(whole)).read_bytes() == path.read_bytes(), path.name


def test_an_index_is_made_whole_again_after_fast_plaid_has_opened_it(run: Path, tmp_path: Path) -> None:
    """It folds the parts into files of its own, removes them, and writes to metadata.json."""
    written = export(run, "index", "fast-plaid", tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "_manifest.json"}
    for i in range(4):
        (tmp_path / f"{i}.codes.npy").unlink()
        (tmp_path / f"{i}.residuals.npy").unlink()
    (tmp_path / "metadata.json").write_text('{"frozen": true}')
    assert export(run, "index", "fast-plaid", tmp_path) == written
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "_manifest.json"} == before


def literal(index: Path, bits: int) -> tuple[torch.Tensor, list[int]]:
    """The rows of an index as fast-plaid reads them, bit by bit, and their centroids."""
    centroids, weights = np.load(index / "centroids.npy").astype(np.float32), np.load(index / "bucket_weights.npy")
    rows, codes = [], []
    for i in range(json.loads((index / "metadata.json").read_text())["num_chunks"]):
        for code, packed in zip(np.load(index / f"{i}.codes.npy"), np.load(index / f"{i}.residuals.npy"), strict=True):
            stream = "".join(f"{byte:08b}" for byte in packed.tolist())
            values = [int(stream[j : j + bits][::-1], 2) for j in range(0, len(stream), bits)]
            rows.append(centroids[code] + weights[values])
            codes.append(int(code))
    return torch.nn.functional.normalize(torch.from_numpy(np.stack(rows)), dim=1), codes


@pytest.mark.parametrize("codec", ["residual1", "residual2", "residual4", "fp16"])
def test_an_index_has_the_codes_of_the_store(run: Path, tmp_path: Path, codec: str) -> None:
    mine, index = tmp_path / "tiny", tmp_path / "index"
    shutil.copytree(run, mine)
    if codec != "fp16":
        recode(mine / "embeddings" / "passages", codec)
    written = export(mine, "index", "fast-plaid", index)
    bits = written["bits"]
    assert bits == {"residual1": 1, "residual2": 2}.get(codec, 4)
    store = passages(mine)
    rows_TD, codes = literal(index, bits)
    stored_TD = store.gather(np.arange(60)).embeddings_TD.float()
    if codec == "fp16":  # learned from these rows
        cosines = (rows_TD * stored_TD).sum(1)
        assert float(cosines.mean()) > 0.995 and float(cosines.min()) > 0.9
    else:
        assert float((rows_TD - stored_TD).abs().max()) < 2e-3  # of fp16
    lengths = [n for i in range(4) for n in json.loads((index / f"doclens.{i}.json").read_text())]
    assert lengths == store.lengths().tolist()
    of_passage = np.repeat(np.arange(60), lengths).tolist()
    lists = np.split(np.load(index / "ivf.npy"), np.cumsum(np.load(index / "ivf_lengths.npy"))[:-1])
    assert len(lists) == written["centroids"] == len(np.load(index / "centroids.npy"))
    for centroid, found in enumerate(lists):
        assert found.tolist() == sorted({p for p, c in zip(of_passage, codes, strict=True) if c == centroid})
    ids = pq.read_table(index / "passage_ids.parquet")["id"].to_pylist()
    assert ids == Collection.open(str(run)).passage_ids(range(60))
    about = json.loads((index / "metadata.json").read_text())
    assert about["num_embeddings"] == store.num_tokens and about["num_documents"] == 60 and about["nbits"] == bits
    offsets = [json.loads((index / f"{i}.metadata.json").read_text())["embedding_offset"] for i in range(4)]
    assert offsets == [0, *np.cumsum([store.shard_tokens(i) for i in range(3)]).tolist()]


def test_what_cannot_be_exported_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown format of vectors(.|\n)*parquet"):
        export(run, "vectors", "csv", None)
    with pytest.raises(UserError, match=r"no such codes(.|\n)*1, 2 or 4"):
        export(run, "index", "fast-plaid", tmp_path / "three", bits=3)
    with pytest.raises(UserError, match="has no student to search with yet"):
        export_stored(str(run), "vectors", "parquet")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("years of work")
    for place in (tmp_path / "used", run / "rankings"):
        with pytest.raises(UserError, match="this place is in use"):
            export(run, "vectors", "parquet", place)
    assert (tmp_path / "used" / "thesis.txt").exists() and list((run / "rankings").glob("*.parquet"))
    inside = export(run, "vectors", "parquet", None)
    assert inside["out"] == str(run / "exports" / "teacher-vectors-parquet")
    assert export(run, "index", "fast-plaid", inside["out"], bits=2)["bits"] == 2  # an earlier export is replaced
    assert not list(Path(inside["out"]).rglob("part-*"))


@pytest.mark.parametrize(
    ("what", "fmt", "name"), [("vectors", "parquet", "vectors"), ("index", "fast-plaid", "passage_ids")]
)
def test_the_card_says_how_an_export_is_loaded(run: Path, tmp_path: Path, what: str, fmt: str, name: str) -> None:
    """What `datasets.load_dataset(folder, name)` reads by the head."""
    written = export(run, what, fmt, tmp_path)
    start, head, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    (config,) = yaml.safe_load(head)["configs"]
    assert not start and config["config_name"] == name
    files = sorted(tmp_path.glob(config["data_files"]))
    assert sum(pq.read_metadata(path).num_rows for path in files) == 60
    assert set(files) == set(tmp_path.rglob("*.parquet"))
    assert f"{written['tokens']:,} token embeddings of 16 dimensions, by the teacher of the run tiny" in text
    if what == "vectors":
        assert all(f"| `{column}` |" in text for column in pq.read_schema(files[0]).names)
    else:
        assert 'search.FastPlaid(index="FOLDER"' in text and "4 bits a dimension" in text
