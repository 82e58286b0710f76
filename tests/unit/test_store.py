"""The token-embedding store: bytes in are bytes out, and damage is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_ray.store import (
    BrokenShardError,
    EmbeddingStore,
    Shard,
    intact_shards,
    shard_name,
    write_manifest,
    write_shard,
)
from ckd_ray.store.codec import Float16
from ckd_ray.store.files import new_folder, read_json, write_atomic, write_json_atomic
from ckd_ray.store.shard import document_frequencies

DIM = 8


def write_store(folder: Path, lengths: list[list[int]], fingerprint: str = "f") -> list[torch.Tensor]:
    """A store with the given passage lengths by shard; returns the rows of every passage."""
    generator = torch.Generator().manual_seed(0)
    headers, passages, size, first = [], [], 0, 0
    for index, shard_lengths in enumerate(lengths):
        sizes = np.array(shard_lengths, np.int32)
        rows = torch.randn(int(sizes.sum()), DIM, generator=generator)
        header, written = write_shard(
            str(folder / shard_name(index)),
            fingerprint=fingerprint,
            index=index,
            first=first,
            lengths=sizes,
            token_ids=np.arange(len(rows), dtype=np.int32) % 5,
            embeddings_TD=rows,
            codec=Float16(DIM),
        )
        headers.append(header)
        passages += list(torch.split(rows.half(), shard_lengths))
        size, first = size + written, first + len(shard_lengths)
    write_manifest(str(folder), fingerprint, headers, size)
    return passages


def test_gather_returns_passages_in_the_order_asked(tmp_path: Path) -> None:
    passages = write_store(tmp_path, [[3, 0, 2], [1], [4, 5]])
    store = EmbeddingStore.open(str(tmp_path))
    asked = [5, 0, 1, 3, 0]
    found = store.gather(np.array(asked))
    assert found.lengths.tolist() == [5, 3, 0, 1, 3]
    for rows, passage in zip(found.split(), asked, strict=True):
        assert torch.equal(rows, passages[passage])
    assert store.num_passages == 6 and store.num_tokens == 15 and store.lengths().tolist() == [3, 0, 2, 1, 4, 5]


def test_gather_refuses_an_unknown_passage(tmp_path: Path) -> None:
    write_store(tmp_path, [[1]])
    with pytest.raises(IndexError, match=r"0\.\.0"):
        EmbeddingStore.open(str(tmp_path)).gather(np.array([1]))


def test_padded_rows_and_mask(tmp_path: Path) -> None:
    passages = write_store(tmp_path, [[2, 0, 3]])
    rows, mask = EmbeddingStore.open(str(tmp_path)).gather(np.array([0, 1, 2])).padded()
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert torch.equal(rows[2], passages[2]) and not rows[1].any()


def test_document_frequencies_count_passages_not_tokens() -> None:
    ids, counts = document_frequencies(np.array([3, 0, 2], np.int32), np.array([7, 7, 9, 7, 1], np.int32))
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {1: 1, 7: 2, 9: 1}


def test_document_frequencies_add_up_over_shards(tmp_path: Path) -> None:
    write_store(tmp_path, [[3, 2], [6]])  # ids 0 1 2 | 3 4 and 0 1 2 3 4 0
    assert EmbeddingStore.open(str(tmp_path)).document_frequencies.tolist() == [2, 2, 2, 2, 2]


def test_reading_copies_nothing(tmp_path: Path) -> None:
    write_store(tmp_path, [[3, 4]])
    shard = Shard(str(tmp_path / shard_name(0)))
    assert shard.embeddings(1).data_ptr() == shard.codes.ctypes.data + 3 * 2 * DIM


@pytest.mark.parametrize("damage", ["truncated", "bit", "foreign", "empty"])
def test_damage_is_found_and_the_rest_kept(tmp_path: Path, damage: str) -> None:
    write_store(tmp_path, [[30, 20], [25], [40]])
    victim = tmp_path / shard_name(1)
    data = bytearray(victim.read_bytes())
    if damage == "truncated":
        victim.write_bytes(data[: len(data) // 2])
    elif damage == "bit":
        codes = Shard(str(victim)).codes.tobytes()
        data[data.index(codes[:64]) + 10] ^= 4
        victim.write_bytes(data)
    elif damage == "foreign":
        other = tmp_path / "other"
        other.mkdir()
        write_store(other, [[30, 20], [25], [40]], fingerprint="another run")
        victim.write_bytes((other / shard_name(1)).read_bytes())
    else:
        victim.write_bytes(b"")
    good, refused = intact_shards(str(tmp_path), "f")
    assert sorted(good) == [0, 2]
    assert list(refused) == [shard_name(1)]


def test_a_shard_swapped_for_another_is_refused_on_opening(tmp_path: Path) -> None:
    write_store(tmp_path, [[3], [4]])
    (tmp_path / shard_name(1)).write_bytes((tmp_path / shard_name(0)).read_bytes())
    with pytest.raises(BrokenShardError, match="not the shard that the manifest names"):
        EmbeddingStore.open(str(tmp_path)).shard(1)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(stream: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(str(tmp_path / "a"), fail)
    assert list(tmp_path.iterdir()) == []


def test_new_folder_replaces_only_when_it_is_whole(tmp_path: Path) -> None:
    target = str(tmp_path / "folder")
    with new_folder(target) as folder:
        write_json_atomic(f"{folder}/x.json", {"version": 1})
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        write_json_atomic(f"{folder}/x.json", {"version": 2})
        raise RuntimeError("killed here")
    assert read_json(f"{target}/x.json") == {"version": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
