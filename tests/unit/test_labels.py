"""The label files: what is written is read back, at random, with few open files; and odd rankings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from ckd_ray.collective import Expansions
from ckd_ray.config.schema import LabelConfig
from ckd_ray.errors import JobError
from ckd_ray.labels import array_parts
from ckd_ray.labels.feedback import expand_ranked
from ckd_ray.labels.files import ExpansionReader, write_labels
from ckd_ray.labels.stage import EstimatedVotes, LabelJob, ServerVotes, label
from ckd_ray.model.encoder import Encoded
from ckd_ray.ray_util import parts
from ckd_ray.ray_util.parts import CPUS_OF_WAITING, part_name
from ckd_ray.retrieve.servers import SearchSettings, ServerGroup
from tests.labelled import write_store
from tests.support import flip_bit

DIM, CLUSTERS, A_PART = 8, 6, 5
SILENT = np.array([0, 1])


def expansions(count: int, seed: int) -> Expansions:
    """Random ones; query i has i % 7 centroids, at most 6."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.arange(count) % (CLUSTERS + 1)
    there = torch.arange(CLUSTERS)[None] < counts[:, None]
    idf = torch.rand(count, CLUSTERS, generator=generator).sort(1, descending=True).values * there
    embeddings = torch.randn(count, CLUSTERS, DIM, generator=generator) * there[:, :, None]
    return Expansions(embeddings, idf, torch.where(there, torch.arange(CLUSTERS)[None] + 10, -1), counts)


@pytest.fixture
def folder(tmp_path: Path) -> tuple[str, list[Expansions]]:
    parts = [expansions(A_PART, seed) for seed in range(20)]
    for i, part in enumerate(parts):
        ids = [f"q{i * A_PART + k}" for k in range(A_PART)]
        write_labels(
            str(tmp_path),
            "train",
            i,
            query_ids=ids,
            feedback_ids=[[f"p{k}"] * (k % 3) for k in range(A_PART)],
            expansions=part,
            clusters=CLUSTERS,
        )
    (tmp_path / "_manifest.json").write_text(f'{{"queries_per_part": {A_PART}}}')
    return str(tmp_path), parts


def test_rows_come_back_at_random(folder: tuple[str, list[Expansions]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_parts, "_OPEN_PARTS", 3)
    reader = ExpansionReader.open(folder[0], "train")
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    asked = np.random.default_rng(0).permutation(100)
    embeddings, weights = reader.select(asked, 4, beta=0.5)
    assert embeddings.shape == (100, 4, DIM) and embeddings.dtype == weights.dtype == torch.float32
    for row, query in enumerate(asked.tolist()):
        part, at = folder[1][query // A_PART], query % A_PART
        assert torch.equal(embeddings[row], part.embeddings_BKD[at, :4])
        assert torch.equal(weights[row], 0.5 * part.idf_BK[at, :4])
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * 3
    assert reader.select(asked[:0], 4, 1.0)[0].shape[:2] == (0, 4)
    assert reader.select(asked[:2], 99, 1.0)[0].shape == (2, CLUSTERS, DIM)


def test_an_object_store_is_read_row_by_row(
    folder: tuple[str, list[Expansions]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path for remote folders, on a file: requests of many threads give the same rows in the same order."""
    plain = ExpansionReader.open(folder[0], "train")
    monkeypatch.setattr(array_parts, "is_local", lambda uri: False)
    remote = ExpansionReader.open(folder[0], "train")
    asked = np.random.default_rng(1).integers(0, 100, 300)
    for a, b in zip(plain.select(asked, 5, 1.0), remote.select(asked, 5, 1.0), strict=True):
        assert torch.equal(a, b)


def test_a_short_file_and_a_wrong_query_are_named(folder: tuple[str, list[Expansions]]) -> None:
    path = Path(folder[0]) / "_rows" / f"{part_name('train', 2)}.npy"
    os.truncate(path, path.stat().st_size - 4)
    reader = ExpansionReader.open(folder[0], "train")
    with pytest.raises(JobError, match=r"train-000002\.npy: shorter"):
        reader.select(np.array([14]), CLUSTERS, 1.0)
    with pytest.raises(FileNotFoundError):
        reader.select(np.array([100]), 4, 1.0)


@pytest.mark.parametrize("file", ["train-000002.parquet", "_rows/train-000002.npy"])
def test_a_bit_that_turns_in_any_vector_or_weight_is_found(folder: tuple[str, list[Expansions]], file: str) -> None:
    path = Path(folder[0]) / file
    written, asked = path.read_bytes(), np.arange(10, 15)
    wanted = ExpansionReader.open(folder[0], "train").select(asked, CLUSTERS)
    vectors = folder[1][2].embeddings_BKD[3, :3].numpy().tobytes()
    at = written.index(vectors) if file.endswith("parquet") else len(written) - 4 * CLUSTERS
    for byte in (at, at + 5):
        path.write_bytes(written)
        flip_bit(path, byte)
        with pytest.raises(JobError, match=r"train-000002\.parquet: the labels of a query are not what was written"):
            ExpansionReader.open(folder[0], "train").select(asked, 1)
    path.write_bytes(written)
    assert torch.equal(ExpansionReader.open(folder[0], "train").select(asked, CLUSTERS)[0], wanted[0])


def test_vectors_are_stored_once(folder: tuple[str, list[Expansions]]) -> None:
    vectors = folder[1][1].embeddings_BKD[4, :4].numpy().tobytes()
    files = [path for path in Path(folder[0]).rglob("*") if path.is_file() and vectors in path.read_bytes()]
    assert [path.name for path in files] == ["train-000001.parquet"]


def test_labels_of_former_runs_are_read(folder: tuple[str, list[Expansions]]) -> None:
    """Schema 1 to 3: the array holds the vectors, with the idf in the last column. Parts of both forms may stand side
    by side, where a stage was stopped and goes on with this version."""
    wanted = ExpansionReader.open(folder[0], "train").select(np.arange(20), 4, 0.5)
    for part, found in enumerate(folder[1][:2]):
        array = np.concatenate([found.embeddings_BKD.numpy(), found.idf_BK.numpy()[:, :, None]], axis=2)
        np.save(Path(folder[0]) / "_rows" / f"{part_name('train', part)}.npy", array)
    for a, b in zip(ExpansionReader.open(folder[0], "train").select(np.arange(20), 4, 0.5), wanted, strict=True):
        assert torch.equal(a, b)


def test_the_parquet_holds_what_there_is(folder: tuple[str, list[Expansions]]) -> None:
    rows = pq.read_table(Path(folder[0]) / f"{part_name('train', 1)}.parquet").to_pylist()
    for i, row in enumerate(rows):
        n, part = i % (CLUSTERS + 1), folder[1][1]
        assert row["query_id"] == f"q{A_PART + i}" and row["feedback_ids"] == [f"p{i}"] * (i % 3)
        assert len(row["expansion"]) == len(row["idf"]) == n and row["token_ids"] == list(range(10, 10 + n))
        assert np.array_equal(np.array(row["expansion"], np.float32).reshape(n, DIM), part.embeddings_BKD[i, :n])


def store(tmp_path: Path, lengths: list[int], tokens: int | None = None) -> object:
    """Passages of random unit rows; token ids from 2 on, or all `tokens`."""
    generator = torch.Generator().manual_seed(3)
    total = sum(lengths)
    rows = F.normalize(torch.randn(total, DIM, generator=generator), dim=1).half()
    ids = np.arange(total) % 40 + 2 if tokens is None else np.full(total, tokens)
    return write_store(tmp_path, Encoded(np.array(lengths, np.int32), ids.astype(np.int32), rows), 3)


def ask(passages: object, feedback: list[list[int]], **more: object) -> Expansions:
    settings = LabelConfig(clusters=CLUSTERS, token_vote="feedback", **more)
    return expand_ranked(passages, np.array(feedback), settings, neighbours=None, special_token_ids=SILENT)


def test_odd_rankings_have_a_defined_outcome(tmp_path: Path) -> None:
    """Passage 0 is empty, passage 1 has fewer tokens than clusters; -1 ends a ranking."""
    passages = store(tmp_path, [0, 4, 30, 25])
    found = ask(passages, [[2, 3, 1], [3, -1, -1], [0, -1, -1], [-1, -1, -1], [1, -1, -1], [0, 2, 3]])
    assert found.counts_B.tolist() == [6, 6, 0, 0, 4, 6]
    assert not found.embeddings_BKD[2:4].any() and not found.idf_BK[2:4].any()
    alone = ask(passages, [[2, 3, -1]])
    assert torch.equal(found.embeddings_BKD[5], alone.embeddings_BKD[0])  # an empty passage is as if it were not there
    nothing = ask(passages, [[-1, -1, -1]] * 2)
    assert nothing.embeddings_BKD.shape == (2, CLUSTERS, DIM) and not nothing.counts_B.any()


def test_only_special_tokens_give_no_expansion(tmp_path: Path) -> None:
    found = ask(store(tmp_path, [9, 9], tokens=1), [[0, 1, -1]])
    assert found.counts_B.tolist() == [0] and not found.select(3)[1].any()


def test_equal_passages_give_equal_weights_in_the_order_of_the_clusters(tmp_path: Path) -> None:
    """One token everywhere: all idf are equal, and nothing but the order of the clusters is left to decide."""
    found = ask(store(tmp_path, [5, 7], tokens=9), [[0, 1, -1]])
    assert found.token_ids_BK.tolist() == [[9] * CLUSTERS] and len(set(found.idf_BK[0].tolist())) == 1
    assert torch.equal(found.embeddings_BKD, ask(store(tmp_path, [5, 7], tokens=9), [[0, 1, -1]]).embeddings_BKD)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite_names_its_passage(tmp_path: Path, value: float) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = F.normalize(torch.randn(12, DIM, generator=generator), dim=1).half()
    rows[7, 2] = value
    passages = write_store(tmp_path, Encoded(np.array([5, 0, 4, 3], np.int32), np.arange(12, dtype=np.int32), rows), 2)
    with pytest.raises(JobError, match=r"passage 2 .*not finite.*fp32"):
        ask(passages, [[0, 3, -1], [2, 0, -1]])
    assert ask(passages, [[0, 3, -1]]).counts_B.tolist() == [6]


def test_a_task_reserves_the_core_that_it_computes_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At a quarter of a core each, four times too many processes shared the cores, each with its own store."""
    asked: list[float] = []

    def noting(missing: Any, spans: Any, work: Any, arguments: Any, cpus: float) -> Any:
        asked.append(cpus)
        return iter(())

    monkeypatch.setattr(parts, "run_parts", noting)
    job = LabelJob("run", "train", "teacher", "passages", "rankings", str(tmp_path), LabelConfig())
    servers = ServerGroup((), SearchSettings("exact"))
    for votes in (None, EstimatedVotes("cells"), ServerVotes(servers, 10)):
        label(job, votes, 300)
    assert asked == [1.0, 1.0, CPUS_OF_WAITING], "tasks that ask servers wait for them, beside them on the same cores"
