"""What is asked of a remote file system: which files of a checkpoint are read, and by how many clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ckd_ray.embed import stream
from ckd_ray.files import atomic, local_copy
from ckd_ray.labels import stage
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.colbert import load_tokenizer


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
    monkeypatch.setattr(atomic, "filesystem_of", lambda uri: (fs, uri.partition(":/")[2]))
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
