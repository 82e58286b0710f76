"""Nothing that is read runs code: every way in is tried with a bomb that would leave a folder behind."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ckd_ray
from ckd_ray.checks import load_config
from ckd_ray.cross_encoder.classifier import PairClassifier
from ckd_ray.cross_encoder.scores import CrossScores
from ckd_ray.data import build_collection
from ckd_ray.errors import UserError
from ckd_ray.model import ColBERTSettings
from ckd_ray.model.exchange import load_any
from ckd_ray.retrieve.rankings import read_ranking_matrix
from tests.support import write_collection

SETTINGS = ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The folder that a bomb would leave."""
    path = tmp_path / "exploded"
    yield path
    assert not path.exists()


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()


def test_a_published_checkpoint(mark: Path, tmp_path: Path, tiny_backbone: str) -> None:
    torch.save({"model_state_dict": Bomb(mark)}, tmp_path / "x.dnn")
    with pytest.raises(UserError, match="this torch file is not read"):
        load_any(str(tmp_path / "x.dnn"), SETTINGS, encoder=tiny_backbone)


def encoder(folder: Path, backbone: str, **config: object) -> Path:
    """The tiny encoder without its weights, its configuration changed."""
    folder.mkdir()
    for file in Path(backbone).iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def test_weights_in_a_torch_file(mark: Path, tmp_path: Path, tiny_backbone: str) -> None:
    folder = encoder(tmp_path / "m", tiny_backbone)
    torch.save({"embeddings.word_embeddings.weight": Bomb(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="the encoder cannot be loaded"):
        load_any(str(folder), SETTINGS)
    with pytest.raises(UserError, match="the cross-encoder cannot be loaded"):
        PairClassifier(str(folder))


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_beside_a_model(mark: Path, tmp_path: Path, tiny_backbone: str, kind: str) -> None:
    """`auto_map` names classes in files beside the model."""
    code = f"import os\nos.mkdir({str(mark)!r})\n"
    classes = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForSequenceClassification": "evil.M"}
    if kind == "model":
        folder = encoder(tmp_path / "m", tiny_backbone, model_type="evil", auto_map=classes)
    else:
        folder = encoder(tmp_path / "m", tiny_backbone)
        (folder / "model.safetensors").write_bytes((Path(tiny_backbone) / "model.safetensors").read_bytes())
        told = json.loads((folder / "tokenizer_config.json").read_text())
        told |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "evil.py").write_text(code)
    if kind == "tokenizer":  # its code may not be needed; the mark says whether it ran
        with suppress(UserError):
            load_any(str(folder), SETTINGS)
        return
    for load in (lambda: load_any(str(folder), SETTINGS), lambda: PairClassifier(str(folder))):
        with pytest.raises(UserError, match="Python code of its own, which ckd-ray never runs") as told:
            load()
        assert "trust_remote_code" not in str(told.value), "an option that we do not have"


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:os.mkdir ['{}']",
        "run: !!python/object/new:os.mkdir ['{}']",
        "run: {{name: !!python/name:os.mkdir }}",
    ],
)
def test_yaml(mark: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text.format(mark))
    with pytest.raises(UserError, match=r"not valid YAML\n  found: could not determine a constructor"):
        load_config(str(tmp_path / "c.yaml"))
    with pytest.raises(UserError, match="could not determine a constructor"):
        load_config(None, [text.format(mark).replace("run: ", "tune.space=", 1)])


def test_arrays_of_objects(mark: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(mark)], object), allow_pickle=True)
    for name in ("train.npy", "train-000000.npy"):
        (tmp_path / name).write_bytes(buffer.getvalue())
    for read in (
        lambda: read_ranking_matrix(str(tmp_path), "train"),
        lambda: CrossScores(str(tmp_path), "train", 1).scores_and_mask(np.array([0]), np.array([0])),
    ):
        with pytest.raises(ValueError, match=r"[Oo]bject|pickle"):
            read()


@pytest.mark.parametrize("name", ["ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "ray.data.arrow_pickled_object"])
def test_parquet_with_types_of_ray(mark: Path, tmp_path: Path, name: str) -> None:
    """Ray registers types whose metadata, up to 2.54, was unpickled as soon as a file's schema was read."""
    import ray.data  # noqa: F401

    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": pickle.dumps(Bomb(mark))}
    storage = pa.large_binary() if name.endswith("object") else pa.list_(pa.int64(), 1)
    values = [pickle.dumps(Bomb(mark))] if name.endswith("object") else [[1]]
    fields = [pa.field("passage_id", pa.string()), pa.field("text", storage, metadata=metadata)]
    table = pa.table([pa.array(["p1"]), pa.array(values, storage)], schema=pa.schema(fields))
    write_collection(tmp_path / "tsv")
    pq.write_table(table, tmp_path / "passages.parquet")
    config = load_config(
        None,
        [
            "collection.format=parquet",
            f"collection.passages={tmp_path / 'passages.parquet'}",
            f"collection.queries={{train: {tmp_path / 'passages.parquet'}}}",
            f"collection.qrels={{train: {tmp_path / 'passages.parquet'}}}",
        ],
    )
    with pytest.raises(UserError, match=r"not a Parquet file|wrong type|no column"):
        build_collection(config.collection, str(tmp_path / "out"))


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_the_package_has_no_other_way_in() -> None:
    """Read from the sources: what would unpickle, evaluate, or run code that came with a model is not there."""
    wrong = []
    for path in sorted(Path(ckd_ray.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wrong += [
                    f"{path.name}: import {a.name}"
                    for a in node.names
                    if "pickle" in a.name or a.name in ("dill", "shelve", "marshal")
                ]
            if isinstance(node, ast.ImportFrom) and "pickle" in (node.module or ""):
                wrong += [f"{path.name}: from pickle {a.name}" for a in node.names if a.name != "UnpicklingError"]
        for name, call in _calls(tree):
            given = {k.arg: ast.unparse(k.value) for k in call.keywords}
            if name == "torch.load" and given.get("weights_only") != "True":
                wrong.append(f"{path.name}: torch.load without weights_only")
            if name == "np.load" and given.get("allow_pickle") != "False":
                wrong.append(f"{path.name}: np.load without allow_pickle=False")
            loads = name.rpartition(".")[2] == "from_pretrained" and name.startswith(("Auto", "kind"))
            if loads and given.get("trust_remote_code") != "False":
                wrong.append(f"{path.name}: {name} without trust_remote_code=False")
            if name in (
                "eval",
                "exec",
                "compile",
                "__import__",
                "os.system",
                "os.popen",
                "yaml.load",
                "pd.read_pickle",
            ):
                wrong.append(f"{path.name}: {name}")
            if given.get("shell") == "True" or given.get("trust_remote_code") == "True":
                wrong.append(f"{path.name}: {name} with {given}")
    assert wrong == []
