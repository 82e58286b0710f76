"""The label stage through Ray: the same files from any number of shards and servers, whatever an earlier try left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ckd_ray.checks import load_config
from ckd_ray.errors import UserError
from ckd_ray.inspection import export_labels
from ckd_ray.inspection.labelled_run import LabelledRun
from ckd_ray.inspection.suggest import SuggestSettings, merge, suggest, suggestions_of_part, write_suggestions
from ckd_ray.labels.stage import EstimatedVotes, LabelJob, ServerVotes, find_special_cells, label
from ckd_ray.model.encoder import Encoded
from ckd_ray.pipeline.runner import run_stages
from ckd_ray.ray_util import parts
from ckd_ray.retrieve.servers import SearchSettings, serving
from ckd_ray.store import EmbeddingStore
from tests.here import in_this_process
from tests.labelled import ranked_run, write_store
from tests.support import ALONE, overrides


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> tuple[Path, Encoded]:
    """A ranked run whose queries stand in three parts; and its encoded passages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.query_spans, "__defaults__", (9,))
        storage = tmp_path_factory.mktemp("label")
        _, passages = ranked_run(storage, tiny_backbone, tiny_collection)
    return storage, passages


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("train-*"))}


@pytest.mark.slow
def test_any_number_of_shards_and_servers_makes_the_same_bytes(
    ray_session: None, made: tuple[Path, Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.query_spans, "__defaults__", (9,))
    storage, passages = made
    run = storage / "tiny"
    settings = load_config(None, overrides(storage, "x", "y")).label
    job = LabelJob(
        run=str(run),
        split="train",
        checkpoint=str(run / "teacher"),
        passages="",
        rankings=str(run / "rankings"),
        out="",
        settings=settings,
    )
    found: dict[str, list[dict[str, bytes]]] = {"exact": [], "estimate": []}
    for shards, servers in ((1, 1), (4, 2), (16, 1), (16, 2)):
        store = write_store(storage / f"store-{shards}", passages, shards)
        mine = replace(job, passages=store.uri, out=str(storage / f"labels-{shards}-{servers}"))
        with serving(store, SearchSettings("exact"), servers) as group:
            assert len(group.actors) == min(shards, servers)
            assert label(mine, ServerVotes(group, 10), 24) == 9
        found["exact"].append(files(Path(mine.out)))
    for shards in (1, 4, 16):
        store = EmbeddingStore.open(str(storage / f"store-{shards}"))
        mine = replace(job, passages=store.uri, out=str(storage / f"cells-{shards}"))
        cells = find_special_cells(f"{mine.out}/_special_cells.safetensors", mine, seed=17)
        label(mine, EstimatedVotes(cells), 24)
        found["estimate"].append(files(Path(mine.out)))
    for way, results in found.items():
        assert len(results[0]) == 6, way
        assert all(r == results[0] for r in results), way
    # A part that is missing, or its array, is made again, alone.
    out = storage / "cells-4"
    (out / "train-000001.parquet").unlink()
    (out / "_rows" / "train-000002.npy").unlink()
    kept = (out / "_rows" / "train-000000.npy").stat().st_mtime_ns
    label(mine := replace(mine, passages=str(storage / "store-4"), out=str(out)), EstimatedVotes(cells), 24)
    assert files(out) == found["estimate"][0] and (out / "_rows" / "train-000000.npy").stat().st_mtime_ns == kept


def test_the_stage_labels_by_the_estimate_suggests_and_exports(
    ray_session: None, made: tuple[Path, Encoded], tmp_path: Path, tiny_backbone: str, tiny_collection: str
) -> None:
    given = f"teacher.checkpoint={made[0] / 'tiny' / 'teacher'}"
    values = overrides(tmp_path, tiny_backbone, tiny_collection, "label.neighbours=estimate", given, *ALONE)
    with in_this_process():
        reports = run_stages(load_config(None, values), until="label")
    assert reports[-1].figures["votes"] == "estimate"
    run = tmp_path / "tiny"
    assert (run / "labels" / "_special_cells.safetensors").exists()
    tokens = pq.read_table(run / "labels" / "train-000000.parquet")["token_ids"].to_pylist()
    assert any(tokens)
    settings = SuggestSettings(top=20, least=0.01)
    assert suggest(str(run), str(tmp_path / "found"), settings) == 20
    here = merge([suggestions_of_part(LabelledRun.open(str(run)), 0, 0, 24, settings)], 20)
    write_suggestions(str(tmp_path / "here"), here)
    assert (tmp_path / "found").read_text() == (tmp_path / "here").read_text()

    alone = export_labels.export_labels(str(run), "pylate", out=str(tmp_path / "alone"), width=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_labels, "_QUERIES_IN_PROCESS", 3)
        patch.setattr(export_labels, "QUERIES_A_BLOCK", 5)
        tasks = export_labels.export_labels(str(run), "pylate", out=str(tmp_path / "tasks"), width=6)
        with pytest.raises(UserError, match="every query would be left out"):
            export_labels.export_labels(str(run), "triples", out=str(tmp_path / "none"), width=60)
    assert {**tasks, "out": ""} == {**alone, "out": ""} and alone["queries"] == 24
    for name in ("train.parquet", "queries.parquet", "documents.parquet"):
        assert pq.read_table(tmp_path / "tasks" / name).equals(pq.read_table(tmp_path / "alone" / name))
