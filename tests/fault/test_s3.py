"""Runs on `s3://`, against a real S3 server in this process: uploads, the cache, and the embed stage."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
import torch

from ckd_ray.checks import load_config
from ckd_ray.collective import Expansions
from ckd_ray.cross_encoder.scores import CrossScores, write_scores
from ckd_ray.data import Collection, build_collection
from ckd_ray.errors import JobError, UserError
from ckd_ray.files import (
    copy_folder,
    delete,
    exists,
    filesystem_of,
    join,
    last_part,
    list_files,
    list_folders,
    local_copy,
    make_folder,
    new_folder,
    read_json,
    sha256_of,
    with_ending,
    write_atomic,
    write_json_atomic,
)
from ckd_ray.files.cache import FOLDER_VARIABLE, LIMIT_VARIABLE
from ckd_ray.inspection.export_labels import export_labels
from ckd_ray.labels.files import ExpansionReader, write_labels
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.pipeline.runner import run_stages
from ckd_ray.runs import lock
from ckd_ray.runs.finished import open_finished
from ckd_ray.runs.lock import run_lock
from ckd_ray.search.export import export_stored
from ckd_ray.store import BrokenShardError, EmbeddingStore, shard_name, write_manifest, write_shard
from ckd_ray.store.codec import Float16
from tests.labelled import labelled_run
from tests.support import overrides

moto_server = pytest.importorskip("moto.server")
DIM = 16


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A URI of a folder in a new bucket; join() keeps its options at the end."""
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    uri = f"s3://key:secret@ckd-ray/folder?scheme=http&endpoint_override={host}:{port}&allow_bucket_creation=true"
    make_folder(uri)
    yield uri
    server.stop()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def names(uri: str) -> dict[str, tuple[int, int]]:
    """(bytes, time of change) of every object below `uri`."""
    fs, path = filesystem_of(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    return {i.path.removeprefix(f"{path}/"): (i.size, i.mtime_ns) for i in infos if i.type == pafs.FileType.File}


def test_an_upload_is_visible_when_it_is_whole(bucket: str) -> None:
    uri = join(bucket, "uploads", "a")
    data = bytes(range(256)) * (1 << 16)  # two parts of an upload

    def write(stream: object) -> None:
        stream.write(data)  # type: ignore[attr-defined]
        assert not exists(uri)

    assert write_atomic(uri, write) == len(data)
    assert names(join(bucket, "uploads")).keys() == {"a"} and names(join(bucket, "uploads"))["a"][0] == len(data)

    def fail(stream: object) -> None:
        stream.write(data)  # type: ignore[attr-defined]
        raise RuntimeError("killed here")

    with pytest.raises(RuntimeError):
        write_atomic(join(bucket, "uploads", "b"), fail)
    code = (
        "import os, signal, sys\nfrom ckd_ray.files import filesystem_of\n"
        "fs, path = filesystem_of(sys.argv[1])\nstream = fs.open_output_stream(path)\n"
        "stream.write(bytes(24 << 20))\nprint(stream.tell(), flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, join(bucket, "uploads", "c")], capture_output=True, text=True)
    assert (killed.returncode, killed.stdout.strip()) == (-9, str(24 << 20)), killed.stderr
    assert list_files(join(bucket, "uploads")) == ["a"]
    write_atomic(join(bucket, "uploads", "empty"), lambda stream: None)
    assert names(join(bucket, "uploads"))["empty"][0] == 0


def test_files_and_folders(bucket: str, tmp_path: Path) -> None:
    write_json_atomic(join(bucket, "f", "x.json"), {"n": 1})
    assert read_json(join(bucket, "f", "x.json")) == {"n": 1} and list_folders(bucket).count("f") == 1
    with new_folder(join(bucket, "f")) as folder:
        (Path(folder) / "deep").mkdir()
        (Path(folder) / "deep" / "y").write_bytes(b"abc")
    assert names(join(bucket, "f")).keys() == {"deep/y"}
    assert sha256_of(join(bucket, "f", "deep", "y")).startswith("ba7816bf")
    with local_copy(join(bucket, "f")) as copy:
        assert (Path(copy) / "deep" / "y").read_bytes() == b"abc"
    delete(join(bucket, "f"))
    assert not exists(join(bucket, "f")) and list_files(join(bucket, "nowhere")) == []


def test_names_below_a_uri_that_has_options(bucket: str) -> None:
    """What is put behind a name goes in front of the options, for labels and scores; so a variant finds its run."""
    folder = join(bucket, "labels")
    one = Expansions(torch.ones(2, 3, 4), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long), torch.tensor([3, 1]))
    ids = ["a", "b"]
    write_labels(folder, "train", 0, query_ids=ids, feedback_ids=[["p"], []], expansions=one, clusters=3)
    embeddings, weights = ExpansionReader(folder, "train", 2).select(np.array([1]), 2, beta=0.5)
    assert embeddings.shape == (1, 2, 4) and weights.tolist() == [[0.5, 0.0]]
    scores = [np.array([2.0, 1.0], np.float32), np.empty(0, np.float32)]
    passages = [np.array([7, 3]), np.empty(0, np.int64)]
    write_scores(folder, "dev", 0, query_ids=ids, passages=passages, scores=scores, passage_ids=["x", "y"])
    found, _ = CrossScores(folder, "dev", 2).scores_and_mask(np.array([0]), np.array([3, 7]))
    assert found.tolist() == [[1.0, 2.0]]
    stems = ("dev-000000", "train-000000")
    assert set(names(folder)) == {f"{s}.parquet" for s in stems} | {f"_rows/{s}.npy" for s in stems}

    run = join(bucket, "runs", "mine")
    write_json_atomic(join(run, "run.json"), {"config": {}})
    write_json_atomic(join(run, "tune", "best", "run.json"), {"config": {}, "variant": "tune/best"})
    found = open_finished(join(run, "tune", "best"))
    assert (found.paths.root, found.name, open_finished(run).name) == (run, "mine/best", "mine")
    assert last_part(with_ending(run, "-pylate")) == "mine-pylate" and "scheme=http" in with_ending(run, "-pylate")


def test_a_download_stays_in_its_folder(bucket: str, tmp_path: Path) -> None:
    """Keys of an object store are free text; one with `..` in it would be written beside the folder."""
    import boto3

    options = dict(pair.split("=") for pair in bucket.partition("?")[2].split("&"))
    client = boto3.client(
        "s3", endpoint_url=f"http://{options['endpoint_override']}", aws_access_key_id="key",
        aws_secret_access_key="secret", region_name="us-east-1",
    )  # fmt: skip
    client.put_object(Bucket="ckd-ray", Key="folder/student/colbert.json", Body=b"{}")
    client.put_object(Bucket="ckd-ray", Key="folder/student/a/../../../../../../../tmp/ckd-ray-evil", Body=b"x")
    with pytest.raises(UserError, match="a name leads out of its folder"), local_copy(join(bucket, "student")):
        pass
    assert not Path("/tmp/ckd-ray-evil").exists()


def test_a_run_on_an_object_store_is_held(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_SETTLE_S", 0.05)
    uri = join(bucket, "held")
    with run_lock(uri):
        with pytest.raises(UserError, match=rf"another ckd-ray works in this run(.|\n)*process {os.getpid()} on"):
            with run_lock(uri):
                pass
        assert exists(join(uri, ".lock"))
    assert list_files(uri) == [], "neither the lock nor a probe is left"
    write_json_atomic(join(uri, ".lock"), {"host": "elsewhere", "pid": 7, "since": "then", "token": "x"})
    with pytest.raises(UserError, match="process 7 on elsewhere since then"), run_lock(uri):
        pass
    monkeypatch.setattr(lock, "_STALE_S", -1.0)  # as if it had not been written for minutes
    with run_lock(uri):
        assert read_json(join(uri, ".lock"))["pid"] == os.getpid()

    # Two that start together: the lock of the other arrives over ours before we look again.
    def other(seconds: float) -> None:
        write_json_atomic(join(uri, ".lock"), {"host": "elsewhere", "pid": 8, "since": "now", "token": "y"})

    monkeypatch.setattr(lock.time, "sleep", other)
    with pytest.raises(UserError, match="process 8 on elsewhere"), run_lock(uri):
        pass
    delete(join(uri, ".lock"))


def write_store(uri: str) -> list[torch.Tensor]:
    passages, headers = [], []
    for i in range(4):
        rows = torch.randn(600, DIM)
        passages += list(rows.half().split(60))
        header, _ = write_shard(
            join(uri, shard_name(i)),
            fingerprint="f",
            index=i,
            first=10 * i,
            lengths=np.full(10, 60, np.int32),
            token_ids=np.arange(600, dtype=np.int32) % 50,
            embeddings_TD=rows,
            codec=Float16(DIM),
        )
        headers.append(header)
    write_manifest(uri, "f", len(headers))
    return passages


def test_a_store_is_read_through_a_bounded_cache(bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = join(bucket, "store")
    passages = write_store(uri)
    monkeypatch.setenv(LIMIT_VARIABLE, str(60_000 / 2**30))  # two shards of 24 kB and the lengths
    asked = np.random.default_rng(0).integers(0, 40, 100)
    for _ in range(2):
        found = EmbeddingStore.open(uri).gather(asked).split()
        assert all(torch.equal(rows, passages[p]) for rows, p in zip(found, asked.tolist(), strict=True))
    held = [p for p in cache.iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in held) <= 60_000 and len(held) >= 2
    for copy in held:
        data = bytearray(copy.read_bytes())
        data[len(data) // 2] ^= 1
        copy.write_bytes(data)
    store = EmbeddingStore.open(uri)
    found = store.gather(asked).split()
    assert all(torch.equal(rows, passages[p]) for rows, p in zip(found, asked.tolist(), strict=True))
    assert store.document_frequencies.tolist() == [40] * 50
    assert store.verify() == [] and store.verify_other_files() == []
    fs, path = filesystem_of(join(uri, shard_name(2)))
    with fs.open_input_stream(path) as stream:
        data = bytearray(stream.read())
    data[data.index(passages[20].numpy().tobytes()[:64])] ^= 1
    write_atomic(join(uri, shard_name(2)), lambda stream: stream.write(bytes(data)))
    assert EmbeddingStore.open(uri).verify() == [shard_name(2)], "checked over there, whatever the cache holds"
    for copy in cache.glob("[0-9a-f]*"):
        copy.unlink()
    with pytest.raises(BrokenShardError, match=r"shard-000002.arrow\?scheme=http"):
        EmbeddingStore.open(uri).gather(np.array([20]))


def test_a_remote_collection(
    bucket: str, cache: Path, tiny_collection: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of several files are asked for together; the ids are mapped from one copy a machine, which is checked."""
    monkeypatch.setattr("ckd_ray.data.build._ROWS_A_BLOCK", 20)
    monkeypatch.setattr("ckd_ray.data.build._ROWS_A_FILE", 20)
    run = join(bucket, "collection")
    settings = load_config(None, ["collection.format=msmarco", f"collection.path={tiny_collection}"]).collection
    local = str(tmp_path / "run")
    for out in (run, local):
        build_collection(settings, out)
    remote, at_home = Collection.open(run), Collection.open(local)
    together, read = threading.Barrier(3), Collection._read

    def read_at_once(collection: Collection, job: tuple[int, list[int]]) -> dict[int, list[str]]:
        together.wait(30)  # the third file's read is there before the first has ended
        return read(collection, job)

    monkeypatch.setattr(Collection, "_read", read_at_once)
    found = remote.texts([59, 0, 30, 0])
    monkeypatch.setattr(Collection, "_read", read)
    assert found == at_home.texts([59, 0, 30, 0])

    assert remote.passage_ids([59, 0, 30]) == ["p59", "p0", "p30"]
    (copy,) = (path for path in cache.iterdir() if path.is_file())
    damaged = bytearray(copy.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    copy.write_bytes(damaged)
    assert Collection.open(run).passage_ids([59, 0, 30]) == ["p59", "p0", "p30"]
    write_atomic(join(run, "corpus", "_ids.arrow"), lambda stream: stream.write(damaged))
    copy.unlink()
    with pytest.raises(JobError, match="not the file that its manifest names"):
        Collection.open(run).passage_ids([0])


def test_embeddings_and_labels_are_exported_from_and_to_an_object_store(
    bucket: str, cache: Path, tmp_path: Path, tiny_backbone: str, tiny_collection: str
) -> None:
    """A run that was copied there gives the same files inside itself as at home."""

    def files(folder: str) -> dict[str, bytes]:
        own = ("_manifest.json", "README.md")  # which name the run
        found = (p for p in Path(folder).rglob("*") if p.is_file() and p.name not in own)
        return {str(p.relative_to(folder)): p.read_bytes() for p in found}

    labelled_run(tmp_path, tiny_backbone, tiny_collection)
    home, remote = str(tmp_path / "tiny"), join(bucket, "exported")
    copy_folder(home, remote)
    for what, fmt in (("vectors", "parquet"), ("index", "fast-plaid")):
        here = export_stored(home, what, fmt, system="teacher")
        there = export_stored(remote, what, fmt, system="teacher")
        assert there == {**here, "out": join(remote, "exports", f"teacher-{what}-{fmt}")}
        with local_copy(there["out"]) as copied:
            assert files(str(copied)) == files(here["out"])
        assert export_stored(remote, what, fmt, system="teacher") == there
    for fmt in ("pylate", "tevatron"):
        here, there = (export_labels(run, fmt, width=6) for run in (home, remote))
        assert there == {**here, "out": join(remote, "exports", f"labels-{fmt}")} and here["queries"] == 24
        with local_copy(there["out"]) as copied:
            assert files(str(copied)) == files(here["out"])
    with pytest.raises(UserError, match="this place is in use"):
        export_labels(remote, "pylate", out=join(remote, "corpus"), width=6)


@pytest.mark.slow
def test_the_embed_stage_on_s3(
    ray_session: None,
    bucket: str,
    cache: Path,
    tmp_path: Path,
    tiny_backbone: str,
    tiny_collection: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ColBERTSettings(dim=DIM, query_maxlen=12, doc_maxlen=48)
    ColBERT.from_backbone(tiny_backbone, settings, seed=1).save(tmp_path / "given")
    changes = [f"teacher.checkpoint={tmp_path / 'given'}", "embed.codec=residual2"]

    def run(storage: str) -> list[bool]:
        config = load_config(None, overrides(storage, tiny_backbone, tiny_collection, *changes))
        return [report.skipped for report in run_stages(config, until="embed")]

    far, near = join(bucket, "runs"), tmp_path / "runs"
    assert run(far) == [False] * 3 and run(str(near)) == [False] * 3
    folder = join(far, "tiny", "embeddings")
    before = names(folder)
    assert {n for n in before if n.endswith(".arrow")} >= {f"passages/{shard_name(i)}" for i in range(4)}
    here = EmbeddingStore.open(str(near / "tiny" / "embeddings" / "passages")).gather(np.arange(60))
    there = EmbeddingStore.open(join(folder, "passages")).gather(np.arange(60))
    assert torch.equal(here.embeddings_TD, there.embeddings_TD) and np.array_equal(here.token_ids, there.token_ids)
    assert run(far) == [True] * 3
    delete(join(folder, "passages", shard_name(1)))
    assert run(far) == [True, True, False]
    after = names(folder)
    again = {n for n in before if n.endswith(".arrow") and before[n] != after[n]}
    assert again == {f"passages/{shard_name(1)}"} and after[again.pop()][0] == before[f"passages/{shard_name(1)}"][0]
    told = capsys.readouterr().err
    assert "secret" not in told and "s3://***@ckd-ray/folder/runs/tiny/embeddings" in told
