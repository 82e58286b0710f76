"""Copies of remote files on the local disk: bounded, shared by processes, and not believed when damaged."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckd_ray.errors import UserError
from ckd_ray.files.cache import FOLDER_VARIABLE, LIMIT_VARIABLE, ShardCache
from ckd_ray.store import BrokenShardError, Shard, shard_name, write_shard
from ckd_ray.store.codec import Float16


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A folder that plays the far side; the cache asks pyarrow for it as for any other."""
    folder = tmp_path / "remote"
    folder.mkdir()
    for i in range(6):
        (folder / f"file-{i}").write_bytes(bytes([i]) * 1000)
    return folder


def held(cache: ShardCache) -> dict[int, Path]:
    """The copies in the cache, by the byte they are full of."""
    return {p.read_bytes()[0]: p for p in cache.folder.iterdir() if p.is_file()}


def fetch(cache: ShardCache, remote: Path, i: int, at: float) -> str:
    """Fetch, as if at the time `at`."""
    path = cache.fetch(f"file://{remote}/file-{i}", "digest")
    os.utime(path, (at, at))
    return path


def test_the_least_recently_used_goes(tmp_path: Path, remote: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 3500)
    for i in range(3):
        assert Path(fetch(cache, remote, i, at=100 + i)).read_bytes() == bytes([i]) * 1000
    fetch(cache, remote, 0, at=200)
    fetch(cache, remote, 3, at=201)
    assert sorted(held(cache)) == [0, 2, 3]
    (remote / "big").write_bytes(b"\x09" * 9000)
    cache.fetch(f"file://{remote}/big", "digest")
    assert sorted(held(cache)) == [9], "one file above the limit is kept alone"


def test_a_copy_is_fetched_once_and_again_for_other_contents(tmp_path: Path, remote: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 10_000)
    uri = f"file://{remote}/file-1"
    first = cache.fetch(uri, "a")
    (remote / "file-1").write_bytes(b"\x07" * 1000)
    assert cache.fetch(uri, "a") == first and Path(first).read_bytes()[0] == 1
    assert Path(cache.fetch(uri, "b")).read_bytes()[0] == 7
    cache.discard(uri, "a")
    assert Path(cache.fetch(uri, "a")).read_bytes()[0] == 7
    with pytest.raises(FileNotFoundError):
        cache.fetch(f"file://{remote}/nowhere", "a")
    assert not list(cache.folder.glob("*.tmp-*"))


def test_downloads_under_way_count_and_dead_ones_go(tmp_path: Path, remote: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 3500)
    fetch(cache, remote, 0, at=100)
    fetch(cache, remote, 1, at=101)
    alive, dead = cache.folder / "x.tmp-1", cache.folder / "x.tmp-2"
    dead.write_bytes(b"\x08" * 1000)
    with alive.open("wb") as file:
        file.write(b"\x09" * 1000)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        fetch(cache, remote, 2, at=102)
        assert alive.exists() and not dead.exists()
        assert sorted(held(cache))[:2] == [1, 2]


def _hammer(folder: str, remote: str, seed: int, failed: Any) -> None:
    cache, rng = ShardCache(folder, 3500), np.random.default_rng(seed)
    for i in rng.integers(0, 6, 60).tolist():
        try:
            data = Path(cache.fetch(f"file://{remote}/file-{i}", "d")).read_bytes()
            good = data == bytes([i]) * 1000
        except FileNotFoundError:
            good = (
                True  # evicted by another between the answer and the reading; a shard is mapped once, and fetched anew
            )
        if not good:
            failed.value += 1


def test_many_processes_share_it(tmp_path: Path, remote: Path) -> None:
    context = multiprocessing.get_context("fork")
    failed = context.Value("i", 0)
    folder = str(tmp_path / "cache")
    processes = [context.Process(target=_hammer, args=(folder, str(remote), seed, failed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * 4 and failed.value == 0
    assert sum(p.stat().st_size for p in Path(folder).iterdir() if p.is_file()) <= 3500
    assert not list(Path(folder).glob("*.tmp-*"))


def shard_on(remote: Path) -> tuple[str, str, torch.Tensor]:
    rows = torch.randn(9, 8)
    uri = f"file://{remote}/{shard_name(0)}"
    header, _ = write_shard(
        uri,
        fingerprint="f",
        index=0,
        first=0,
        lengths=np.array([4, 5], np.int32),
        token_ids=np.arange(9, dtype=np.int32),
        embeddings_TD=rows,
        codec=Float16(8),
    )
    return uri, header.sha256, rows.half()


@pytest.mark.parametrize("kind", ["bit", "truncated", "bit while it is open"])
def test_a_damaged_copy_is_noticed_and_fetched_again(tmp_path: Path, remote: Path, kind: str) -> None:
    uri, digest, rows = shard_on(remote)
    cache = ShardCache(str(tmp_path / "cache"), 10**6)
    copy = Path(cache.fetch(uri, digest))
    data = copy.read_bytes()
    at = data.index(rows.numpy().tobytes()[:32])
    shard = Shard(uri, cache, digest) if kind == "bit while it is open" else None
    with copy.open("r+b") as file:
        if kind == "truncated":
            file.truncate(at)
        else:
            file.seek(at + 5 * 16)
            file.write(bytes([data[at + 5 * 16] ^ 1]))
    shard = shard or Shard(uri, cache, digest)
    codes, ids = np.empty((9, 16), np.uint8), np.empty(9, np.int32)
    shard.copy([1, 0], codes, ids, [0, 5])
    assert torch.equal(Float16(8).decode(codes), torch.cat([rows[4:], rows[:4]]))
    shard.verify()
    assert Path(cache.fetch(uri, digest)).read_bytes() == data == Path(uri.removeprefix("file://")).read_bytes()


def test_a_remote_file_that_is_broken_itself_is_refused(tmp_path: Path, remote: Path) -> None:
    uri, digest, _ = shard_on(remote)
    cache = ShardCache(str(tmp_path / "cache"), 10**6)
    (remote / shard_name(0)).write_bytes((remote / shard_name(0)).read_bytes()[:-300])
    with pytest.raises(BrokenShardError, match=f"{uri}: not a whole shard"):
        Shard(uri, cache, digest)


def test_what_the_environment_may_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "here"))
    monkeypatch.setenv(LIMIT_VARIABLE, "0.5")
    cache = ShardCache.of_this_machine()
    assert (cache.folder, cache.limit) == (tmp_path / "here", 2**29)
    for wrong in ("much", "0", "-1", "nan"):
        monkeypatch.setenv(LIMIT_VARIABLE, wrong)
        with pytest.raises(UserError, match=f"(?s){LIMIT_VARIABLE}.*{wrong}"):
            ShardCache.of_this_machine()
    monkeypatch.delenv(LIMIT_VARIABLE)
    assert 0 < ShardCache.of_this_machine().limit <= 50 * 2**30
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(UserError, match=FOLDER_VARIABLE):
        ShardCache.of_this_machine()
