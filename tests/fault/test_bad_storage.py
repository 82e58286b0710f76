"""Storage that answers with errors, breaks off, or gives half an object for the whole: what is read is right, or is
refused, and what is written is whole, or not there."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_ray.errors import JobError, UserError
from ckd_ray.files import (
    atomic,
    join,
    list_files,
    local_copy,
    make_folder,
    new_folder,
    paths,
    read_json,
    sha256_of,
    write_atomic,
    write_json_atomic,
)
from ckd_ray.files.cache import FOLDER_VARIABLE
from ckd_ray.store import EmbeddingStore, shard_name
from tests.fault.bad_storage import WAYS, BadStorage
from tests.fault.test_s3 import write_store

moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def storage() -> Iterator[tuple[BadStorage, str, str]]:
    """The bad server, and one folder as it is seen through it and directly."""
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    bad = BadStorage(host, port)
    uri = "s3://key:secret@ckd-bad/folder?scheme=http&allow_bucket_creation=true&endpoint_override="
    make_folder(f"{uri}{host}:{port}")
    yield bad, f"{uri}127.0.0.1:{bad.port}", f"{uri}{host}:{port}"
    bad.stop()
    server.stop()


def test_what_is_read_is_right_or_nothing(
    storage: tuple[BadStorage, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, through, direct = storage
    passages = write_store(join(direct, "store"))
    bad.share, bad.given = 0.25, Counter()
    asked, outcomes = np.random.default_rng(0).integers(0, 40, (10, 6)), Counter[str]()
    for i, some in enumerate(asked):
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / f"cache-{i}"))  # nothing is there from before
        try:
            found = EmbeddingStore.open(join(through, "store")).gather(some).split()
        except (JobError, UserError, OSError) as error:
            outcomes["refused"] += 1
            assert len(str(error)) > 10
            continue
        outcomes["right"] += 1
        assert all(torch.equal(rows, passages[p]) for rows, p in zip(found, some.tolist(), strict=True))
    assert outcomes["right"] and outcomes["refused"] and sum(outcomes.values()) == 10, outcomes
    assert all(bad.given[way] for way in bad.ways), bad.given
    bad.share = 0.0
    found = EmbeddingStore.open(join(through, "store")).gather(asked[0]).split()
    assert all(torch.equal(rows, passages[p]) for rows, p in zip(found, asked[0].tolist(), strict=True))


def test_what_is_written_is_whole_or_not_there(storage: tuple[BadStorage, str, str]) -> None:
    bad, through, direct = storage
    bad.share, bad.ways, bad.given = 0.25, ("error",), Counter()
    data = bytes(range(256)) * 4096
    for i in range(4):
        with suppress(OSError, JobError):
            write_atomic(join(through, "written", f"{i:02d}"), lambda stream: stream.write(data))
        with suppress(OSError, JobError):
            write_json_atomic(join(through, "written", f"{i:02d}.json"), {"n": i})
    bad.share = 0.0
    assert bad.given["error"]
    names = list_files(join(direct, "written"))
    import hashlib

    for name in names:
        if name.endswith(".json"):
            assert read_json(join(direct, "written", name)) == {"n": int(name[:2])}
        else:
            assert sha256_of(join(direct, "written", name)) == hashlib.sha256(data).hexdigest()


def test_a_broken_shard_is_told_from_broken_storage(storage: tuple[BadStorage, str, str]) -> None:
    """A check of the store through storage that gives half an object for the whole calls shards broken that are not;
    they are made again, and no worse comes of it."""
    bad, through, direct = storage
    write_store(join(direct, "again"))
    bad.share, bad.ways = 1.0, ("cut short",)
    with suppress(JobError, UserError, OSError):
        assert set(EmbeddingStore.open(join(through, "again")).verify()) <= {shard_name(i) for i in range(4)}
    bad.share = 0.0
    assert EmbeddingStore.open(join(through, "again")).verify() == []


def test_half_a_record_is_read_again(storage: tuple[BadStorage, str, str]) -> None:
    """Half of a manifest is not valid JSON, but the manifest is sound: to delete it would make a whole store again."""
    bad, through, direct = storage
    write_json_atomic(join(direct, "record.json"), {"n": 1, "more": "x" * 100})
    bad.share, bad.ways, bad.given = 1.0, ("cut short",), Counter()
    with pytest.raises(UserError, match="run again, as the storage may have given a part of it"):
        read_json(join(through, "record.json"))
    assert bad.given["cut short"] == 4
    threading.Timer(0.3, lambda: setattr(bad, "share", 0.0)).start()
    assert read_json(join(through, "record.json"))["n"] == 1 and bad.given["cut short"] > 4


def test_an_upload_that_is_refused_is_an_error(
    storage: tuple[BadStorage, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyArrow's own copy of a folder leaves the file out here, and says nothing."""
    bad, through, direct = storage
    monkeypatch.setattr(paths, "_ATTEMPTS", 2)
    monkeypatch.setattr(atomic, "_TRIES", 1)
    through, direct = (uri.replace("ckd-bad", "ckd-refused") for uri in (through, direct))  # a client of its own
    make_folder(direct)
    bad.share, bad.refused = 0.0, "model/b"
    try:
        with pytest.raises(OSError), new_folder(join(through, "model")) as folder:
            for name in "abc":
                (Path(folder) / name).write_bytes(name.encode() * 5_000)
    finally:
        bad.refused = None
    assert "b" not in list_files(join(direct, "model"))


def test_a_folder_that_was_uploaded_is_whole(storage: tuple[BadStorage, str, str]) -> None:
    bad, through, direct = storage
    bad.share, bad.ways, bad.given = 0.3, ("error",), Counter()
    outcomes = Counter[str]()
    for i in range(12):
        names = {"weights": 300_000, "config.json": 700, "deep/part": 4_000}
        try:
            with new_folder(join(through, f"folder-{i}")) as folder:
                for name, size in names.items():
                    (Path(folder) / name).parent.mkdir(exist_ok=True)
                    (Path(folder) / name).write_bytes(bytes([i]) * size)
        except OSError:
            outcomes["refused"] += 1
            continue
        outcomes["uploaded"] += 1
        share, bad.share = bad.share, 0.0
        with local_copy(join(direct, f"folder-{i}")) as copy:
            assert {n: (Path(copy) / n).read_bytes() for n in names} == {n: bytes([i]) * k for n, k in names.items()}
        bad.share = share
    assert outcomes["uploaded"] and bad.given["error"] > 5, (outcomes, bad.given)


def test_a_folder_that_was_downloaded_is_whole(storage: tuple[BadStorage, str, str]) -> None:
    bad, through, direct = storage
    bad.share, bad.ways = 0.0, WAYS
    with new_folder(join(direct, "model")) as folder:
        for i in range(4):
            (Path(folder) / f"{i}").write_bytes(bytes([i]) * 50_000)
    outcomes = Counter[str]()
    # Half of an object, given as all of it, may arrive in its full length: weights have checksums of their own.
    bad.share, bad.ways, bad.given = 0.3, ("error", "broken off"), Counter()
    for _ in range(12):
        try:
            with local_copy(join(through, "model"), without=("3",)) as copy:
                assert {p.name: p.read_bytes() for p in Path(copy).iterdir()} == {
                    f"{i}": bytes([i]) * 50_000 for i in range(3)
                }
            outcomes["right"] += 1
        except OSError:
            outcomes["refused"] += 1
    assert outcomes["right"] and all(bad.given[way] for way in bad.ways), (outcomes, bad.given)
