"""What is asked of a remote file system: which files of a checkpoint are read, and by how many clients."""

from __future__ import annotations

import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ckd_ray.embed import stream
from ckd_ray.errors import UserError
from ckd_ray.files import (
    atomic,
    filesystem_of,
    join,
    list_files,
    local_copy,
    make_folder,
    paths,
    read_json,
    write_json_atomic,
)
from ckd_ray.labels import stage
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.colbert import load_tokenizer
from tests.fault.bad_storage import BadStorage

_NOWHERE = "scheme=http&endpoint_override=127.0.0.1:1"


class _Counting(pafs.FSSpecHandler):
    """Notes the files that are opened for reading."""

    def __init__(self, fs: Any) -> None:
        super().__init__(fs)
        self.read: list[str] = []

    def open_input_stream(self, path: str) -> Any:
        self.read.append(path.rpartition("/")[2])
        return super().open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        self.read.append(path.rpartition("/")[2])
        return super().open_input_file(path)


@pytest.fixture
def remote(tiny_backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[_Counting, Path]:
    """`mem://student` holds a checkpoint: (the reads of it, the same checkpoint in a local folder)."""
    local = tmp_path / "student"
    ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)).save(local)
    (local / "more").mkdir()
    (local / "more" / "notes.json").write_text("{}")
    memory = _Counting(MemoryFileSystem())
    fs = pafs.PyFileSystem(memory)
    pafs.copy_files(str(local), "student", source_filesystem=pafs.LocalFileSystem(), destination_filesystem=fs)
    for module in (atomic, paths):
        monkeypatch.setattr(module, "filesystem_of", lambda uri: (fs, uri.partition(":/")[2]))
    return memory, local


def test_a_tokenizer_is_read_without_the_weights(remote: tuple[_Counting, Path]) -> None:
    """Labelling tasks and the feeders of embed are up to one a core, and each reads the checkpoint for itself."""
    memory, local = remote
    stage._special_token_ids.cache_clear()
    found = stage._special_token_ids("mem://student").tolist()
    assert found == load_tokenizer(local).special_token_ids.tolist()
    wanted = {str(p.relative_to(local)) for p in local.rglob("*") if p.is_file() and p.suffix != ".safetensors"}
    assert {"tokenizer.json", "colbert.json", "more/notes.json"} <= wanted
    assert sorted(memory.read) == sorted(name.rpartition("/")[2] for name in wanted)


def test_the_feeders_of_embed_read_no_weights(remote: tuple[_Counting, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    memory, _ = remote
    monkeypatch.setattr(stream.Collection, "open", lambda run: stream.Collection)
    job = stream.EmbedJob("run", "passages", "mem://student", "out", "f", "auto", "fp32")
    tokenizer, _ = stream._tokenizer_and_texts(job)
    assert tokenizer.cls_id >= 0 and not [name for name in memory.read if name.endswith(".safetensors")]


def test_a_model_is_copied_whole(remote: tuple[_Counting, Path]) -> None:
    _, local = remote
    with local_copy("mem://student") as folder:
        assert (Path(folder) / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
        assert ColBERT.from_pretrained(folder).settings.dim == 16


@pytest.mark.parametrize(
    "key", ["", "/", "/f%20x/y", "/f/", "/%C3%BCx/t.json", "/f//x/../y", "/a+b", "/a%2Bb", "/x%3Fy"]
)
def test_the_path_in_a_bucket_is_the_one_that_arrow_reads(key: str) -> None:
    uri = f"s3://k:s%2F@b{key}?{_NOWHERE}"
    fs, path = filesystem_of(uri)
    assert path == pafs.FileSystem.from_uri(uri)[1]
    assert isinstance(fs, pafs.S3FileSystem)


def test_a_process_has_one_client_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = {id(filesystem_of(f"s3://b/{name}?{_NOWHERE}")[0]) for name in ("x", "y/z", "")}
    other = filesystem_of(f"s3://c/x?{_NOWHERE}")[0]
    assert len(clients) == 1 and id(other) not in clients
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert id(filesystem_of(f"s3://b/x?{_NOWHERE}")[0]) not in clients


@pytest.mark.parametrize("uri", ["s3:///x", "s3://b/a b", "s3://b/x?endpoint_override=127.0.0.1:1&unknown=1"])
def test_a_bad_uri_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="this storage cannot be opened"):
        filesystem_of(uri)


def test_operations_share_connections(tmp_path: Path) -> None:
    """Counted by a proxy in front of an S3 server: ten operations came on ten connections before."""
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    proxy = BadStorage(*server.get_host_and_port())
    opened, accept = [], proxy.server.get_request

    def counted() -> Any:
        opened.append(accept())
        return opened[-1]

    proxy.server.get_request = counted  # type: ignore[method-assign]
    try:
        uri = f"s3://key:secret@one/f?scheme=http&endpoint_override=127.0.0.1:{proxy.port}&allow_bucket_creation=true"
        make_folder(uri)
        for i in range(5):
            write_json_atomic(join(uri, f"{i}.json"), {"n": i})
            assert read_json(join(uri, f"{i}.json")) == {"n": i}
        assert len(list_files(uri)) == 5
        assert 1 <= len(opened) <= 3
    finally:
        proxy.stop()
        server.stop()


def test_a_copy_in_another_process_is_as_patient() -> None:
    """Ray Train sends the file system to the workers, which write checkpoints with it. A plain copy gives up at the
    third failure, after two seconds."""
    asked: list[str] = []

    class Busy(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(503 if len(asked) <= 4 else 200)
            self.send_header("Content-Length", "5")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fs, path = filesystem_of(f"s3://a:b@bucket/file?scheme=http&endpoint_override=127.0.0.1:{server.server_port}")
        copy = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(fs))))
        assert copy == fs and copy.get_file_info(path).size == 5 and len(asked) == 5
        server.shutdown()
