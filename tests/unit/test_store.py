"""The token-embedding store: bytes in are bytes out, and damage is found."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_ray.errors import JobError
from ckd_ray.files import (
    filesystem_of,
    join,
    new_folder,
    parent,
    read_json,
    remove_stale,
    write_atomic,
    write_json_atomic,
)
from ckd_ray.store import (
    BrokenShardError,
    EmbeddingStore,
    Shard,
    intact_shards,
    shard_name,
    write_manifest,
    write_shard,
)
from ckd_ray.store.codec import Codec, Float16
from ckd_ray.store.codec_training import train_codec
from ckd_ray.store.shard import document_frequencies, read_header
from ckd_ray.store.writing import FREQUENCIES, LENGTHS, close_store, summarise_shards

DIM = 8


def write_store(
    folder: Path, lengths: list[list[int]], fingerprint: str = "f", codec: Codec | None = None
) -> list[torch.Tensor]:
    """A store with the given passage lengths by shard; returns the rows of every passage."""
    codec = codec or Float16(DIM)
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
            codec=codec,
        )
        headers.append(header)
        passages += list(torch.split(codec.decode(codec.encode(rows)), shard_lengths))
        size, first = size + written, first + len(shard_lengths)
    write_manifest(str(folder), fingerprint, len(headers))
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


def test_reading_maps_memory_that_is_read_only(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write_store(tmp_path, [[3, 4]])
    store = EmbeddingStore.open(str(tmp_path))
    shard = store.shard(0)
    assert not shard.codes.flags.writeable and not store.lengths().flags.writeable
    low = shard.codes.ctypes.data
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(shard_name(0))]
    assert any(int(m[0].split("-")[0], 16) <= low < int(m[0].split("-")[1], 16) and m[1].startswith("r-") for m in maps)
    found = store.gather(np.array([1, 0]))
    found.embeddings_TD.zero_()  # a copy of its own: writing to it changes nothing on the disk
    assert shard.embeddings().abs().sum() > 0
    assert not [w for w in recwarn if "not writable" in str(w.message)]


def test_gather_is_the_same_for_learned_codecs_and_many_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = [rng.integers(0, 7, rng.integers(1, 9)).tolist() for _ in range(12)]
    from ckd_ray.store.codec import load_codec, save_codec

    trained = train_codec("residual2", torch.randn(200, DIM), 9)
    codec = load_codec("residual2", DIM, str(tmp_path), save_codec(trained, str(tmp_path)))
    passages = write_store(tmp_path, lengths, codec=codec)
    store = EmbeddingStore.open(str(tmp_path))
    asked = rng.integers(0, store.num_passages, 200)
    found = store.gather(asked)
    for rows, passage in zip(found.split(), asked.tolist(), strict=True):
        assert torch.equal(rows, passages[passage])
    ids = np.concatenate([np.arange(sum(shard)) % 5 for shard in lengths])
    bounds = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(int)
    assert np.array_equal(found.token_ids, np.concatenate([ids[bounds[p] : bounds[p + 1]] for p in asked]))
    nothing = store.gather(np.array([], np.int64))
    assert nothing.embeddings_TD.shape == (0, DIM) and nothing.split() == []


def test_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    passages = write_store(tmp_path, [[2]] * 60)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (40, 40))
    store = EmbeddingStore.open(str(tmp_path))
    found = store.gather(np.arange(60))
    assert all(torch.equal(a, b) for a, b in zip(found.split(), passages, strict=True))
    names = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len({name for name in names if name.endswith(".arrow")}) == 10


def test_opening_a_store_touches_no_shard(tmp_path: Path) -> None:
    """Sizes, lengths and document frequencies come from the files that closing has written."""
    write_store(tmp_path, [[3, 0], [2], [1, 5]])
    for path in tmp_path.glob("*.arrow"):
        path.unlink()
    store = EmbeddingStore.open(str(tmp_path))
    assert (store.num_passages, store.num_tokens, store.num_shards, store.shard_tokens(2)) == (5, 11, 3, 6)
    assert store.lengths().tolist() == [3, 0, 2, 1, 5]
    # ids 0 1 2 | 0 1 | 0 and 1 2 3 4 0
    assert store.document_frequencies.tolist() == [4, 3, 2, 1, 1]


def test_an_empty_store(tmp_path: Path) -> None:
    write_manifest(str(tmp_path), "f", 0)
    store = EmbeddingStore.open(str(tmp_path))
    assert store.num_passages == 0 and len(store.lengths()) == len(store.document_frequencies) == 0
    assert store.gather(np.array([], np.int64)).split() == [] and store.verify() == []


@pytest.mark.parametrize("name", [LENGTHS, FREQUENCIES])
def test_files_beside_the_shards_are_checked(tmp_path: Path, name: str) -> None:
    write_store(tmp_path, [[3, 0], [2]])
    assert EmbeddingStore.open(str(tmp_path)).verify_other_files() == []
    data = bytearray((tmp_path / name).read_bytes())
    data[0] ^= 1
    for contents in (bytes(data), data[:-1], b""):
        (tmp_path / name).write_bytes(contents)
        store = EmbeddingStore.open(str(tmp_path))
        with pytest.raises(BrokenShardError, match=name):
            store.lengths() if name == LENGTHS else store.document_frequencies
        assert store.verify_other_files() == [name]


def test_a_store_is_closed_over_its_own_shards_only(tmp_path: Path) -> None:
    write_store(tmp_path, [[3], [2], [4]])
    folder = str(tmp_path)
    whole, parts = summarise_shards(folder, "f", 0, 3), [summarise_shards(folder, "f", i, i + 1) for i in range(3)]
    manifest = (tmp_path / "manifest.json").read_bytes()
    close_store(folder, "f", iter(parts))
    assert (tmp_path / "manifest.json").read_bytes() == manifest
    close_store(folder, "f", [whole])
    assert (tmp_path / "manifest.json").read_bytes() == manifest
    with pytest.raises(BrokenShardError, match="another store"):
        summarise_shards(folder, "g", 0, 3)
    with pytest.raises(JobError, match="holds the passages 2 to 3, not 1 to 2"):
        close_store(folder, "f", [parts[0], parts[2]])
    with pytest.raises(JobError, match="holds the passages 0 to 1, not 4 to 5"):
        close_store(folder, "f", [whole], spans=[(4, 5), (1, 2), (2, 3)])
    (tmp_path / shard_name(1)).rename(tmp_path / shard_name(2))
    with pytest.raises(BrokenShardError, match="another place"):
        summarise_shards(folder, "f", 2, 3)
    with pytest.raises(BrokenShardError, match=shard_name(1)):
        summarise_shards(folder, "f", 1, 2)


def damage(folder: Path, victim: Path, kind: str) -> None:
    """Break the shard `victim` (of index 1) in one of the ways that a disk or a hand has."""
    data = bytearray(victim.read_bytes())
    if kind == "truncated":
        victim.write_bytes(data[: len(data) // 2])
    elif kind == "bit":
        codes = Shard(str(victim)).codes.tobytes()
        data[data.index(codes[:64]) + 10] ^= 4
        victim.write_bytes(data)
    elif kind == "another run":
        other = folder / "other"
        other.mkdir()
        write_store(other, [[30, 20], [25], [40]], fingerprint="another run")
        victim.write_bytes((other / shard_name(1)).read_bytes())
    elif kind == "another index":
        victim.write_bytes((folder / shard_name(2)).read_bytes())
    else:
        victim.write_bytes(b"" if kind == "empty" else b"ARROW1" * 9)


@pytest.mark.parametrize("kind", ["truncated", "bit", "another run", "another index", "empty", "rubbish"])
def test_damage_is_found_and_the_rest_kept(tmp_path: Path, kind: str) -> None:
    write_store(tmp_path, [[30, 20], [25], [40]])
    damage(tmp_path, tmp_path / shard_name(1), kind)
    good, refused = intact_shards(str(tmp_path), "f")
    assert sorted(good) == [0, 2]
    assert list(refused) == [shard_name(1)] and str(tmp_path / shard_name(1)) in refused[shard_name(1)]
    assert EmbeddingStore.open(str(tmp_path)).verify() == [shard_name(1)]


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    """One bit of every byte of the file in turn: refused, or (padding) nothing that is read differs."""
    write_store(tmp_path, [[2, 1]])
    path = tmp_path / shard_name(0)
    data, original = path.read_bytes(), Shard(str(path))
    columns = ("lengths", "offsets", "token_ids", "codes", "sums", "frequency_ids", "frequency_counts")
    kept = {name: getattr(original, name).copy() for name in columns}
    refused = 0
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        (tmp_path / "flipped").write_bytes(flipped)
        try:
            shard = Shard(str(tmp_path / "flipped"))
            shard.verify()
        except BrokenShardError:
            refused += 1
            continue
        assert shard.header == original.header, at
        assert all(np.array_equal(getattr(shard, name), values) for name, values in kept.items()), at
    assert refused > len(data) / 3


def test_a_file_that_is_written_to_under_its_reader_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map shows what others write to the file. What is put in the file's place does not reach the map."""
    write_store(tmp_path, [[30, 20]])
    path = tmp_path / shard_name(0)
    shard, data = Shard(str(path)), path.read_bytes()
    reads, verify = [], Shard._verify
    monkeypatch.setattr(Shard, "_verify", lambda self: (reads.append(self), verify(self)))
    shard.check_unchanged()
    assert not reads, "nothing is read of a file that nobody wrote to"

    def write(at: int, byte: int) -> None:
        before = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == before:  # the clock of the file system ticks every few milliseconds
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes([byte]))

    at = data.index(shard.codes.tobytes())
    write(at, data[at])
    shard.check_unchanged()
    shard.check_unchanged()
    assert len(reads) == 1, "the same bytes are read once, and are no damage"
    (tmp_path / "other").write_bytes(data[: len(data) // 2])
    os.replace(tmp_path / "other", path)
    shard.check_unchanged()
    path.write_bytes(data)
    shard = Shard(str(path))
    write(at, data[at] ^ 4)
    with pytest.raises(BrokenShardError, match="its bytes do not match its checksum"):
        shard.check_unchanged()


def test_a_passage_is_checked_when_it_is_read(tmp_path: Path) -> None:
    """The shard as a whole is not read, so that random access stays cheap; what is handed out is right."""
    passages = write_store(tmp_path, [[30, 20], [25], [40]])
    damage(tmp_path, tmp_path / shard_name(1), "bit")
    store = EmbeddingStore.open(str(tmp_path))
    assert torch.equal(store.gather(np.array([3])).embeddings_TD, passages[3])
    broken = (tmp_path / shard_name(1)).read_bytes()
    with pytest.raises(BrokenShardError, match=rf"{shard_name(1)}: the bytes of passage 2 "):
        store.gather(np.array([3, 2]))
    (tmp_path / "again").mkdir()
    write_store(tmp_path / "again", [[30, 20], [25], [40]])
    (tmp_path / "again" / shard_name(1)).replace(tmp_path / shard_name(1))  # as a repair does
    assert (tmp_path / shard_name(1)).read_bytes() != broken
    assert torch.equal(store.gather(np.array([3, 2])).embeddings_TD, torch.cat([passages[3], passages[2]]))


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


def test_new_folder_has_the_permissions_that_the_umask_gives(tmp_path: Path) -> None:
    with new_folder(str(tmp_path / "f")) as folder:
        (Path(folder) / "model.safetensors").touch(0o600)
    (tmp_path / "plain").touch()
    assert (tmp_path / "f" / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "folder").mkdir()
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_new_folder_replaces_only_when_it_is_whole(tmp_path: Path) -> None:
    target = str(tmp_path / "folder")
    with new_folder(target) as folder:
        write_json_atomic(f"{folder}/x.json", {"version": 1})
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        write_json_atomic(f"{folder}/x.json", {"version": 2})
        raise RuntimeError("killed here")
    assert read_json(f"{target}/x.json") == {"version": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("uri", "parts", "joined", "above"),
    [
        ("/a/b/", ("c", "d"), "/a/b/c/d", "/a/b/c"),
        ("runs", ("c",), "runs/c", "runs"),
        ("/a/what?x=1", ("c",), "/a/what?x=1/c", "/a/what?x=1"),
        ("s3://bucket/a", ("b", "c"), "s3://bucket/a/b/c", "s3://bucket/a/b"),
        ("s3://k:s@bucket/a/?scheme=http&x=/y", ("b",), "s3://k:s@bucket/a/b?scheme=http&x=/y", None),
    ],
)
def test_join_keeps_a_uri_s_options_at_its_end(uri: str, parts: tuple[str, ...], joined: str, above: str) -> None:
    assert join(uri, *parts) == joined
    assert parent(joined) == (above or "s3://k:s@bucket/a?scheme=http&x=/y")


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "embeddings"
    write_json_atomic(str(folder / "passages" / "plan.json"), {})
    stale = [folder / "passages" / "shard-000001.arrow.tmp-1234abcd", tmp_path / ".embeddings.old-12"]
    stale += [tmp_path / ".embeddings.tmp-x1", folder / ".matrix.tmp-q"]
    kept = [tmp_path / ".teacher.tmp-x1", tmp_path / "other.tmp-1", folder / "passages" / "plan.json"]
    for path in (stale[0], kept[1]):
        path.write_bytes(b"half")
    for path in (*stale[1:], kept[0]):
        path.mkdir()
        (path / "file").write_bytes(b"half")
    assert sorted(remove_stale(str(folder))) == sorted(map(str, stale))
    assert not any(path.exists() for path in stale) and all(path.exists() for path in kept)
    assert remove_stale(str(tmp_path / "nowhere")) == []


def test_a_full_disk_is_a_job_error_that_names_the_path(tmp_path: Path) -> None:
    """A limit on the size of a file stands in for the disk; it holds for a process, so for one of its own."""
    import multiprocessing

    write_json_atomic(str(tmp_path / "a"), {"whole": True})
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_write_too_much, args=(str(tmp_path / "a"),))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert read_json(str(tmp_path / "a")) == {"whole": True} and [p.name for p in tmp_path.iterdir()] == ["a"]


def _write_too_much(path: str) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    with pytest.raises(JobError, match=f"{path}: cannot be written: File too large; make room"):
        write_atomic(path, lambda stream: stream.write(b"x" * (1 << 17)))


def test_a_read_header_needs_no_columns(tmp_path: Path) -> None:
    write_store(tmp_path, [[3, 1]])
    header, ids, counts, lengths = read_header(str(tmp_path / shard_name(0)))
    assert lengths.tolist() == [3, 1]
    assert (header.passages, header.tokens, header.first) == (2, 4, 0)
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert filesystem_of(str(tmp_path))[1] == str(tmp_path)
