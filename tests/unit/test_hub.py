"""Models by their hub ids, from a cache laid out as the hub's own (no network), and exports that go to the hub."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import RepoUrl
from safetensors.torch import load_file, save_file

from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.exchange import FORMATS, load_any, write_export
from ckd_ray.model.pooled import PooledModel
from ckd_ray.model.sources import _snapshot, is_hub_id, resolve_backbone
from ckd_ray.pipeline.card import Facts, model_card
from ckd_ray.pipeline.push import check_repository, push_folder
from tests.support import tiny_bert

SETTINGS = ColBERTSettings(dim=16, query_maxlen=8, doc_maxlen=12)
DEFAULTS = ColBERTSettings(dim=16, query_maxlen=9, doc_maxlen=20)
HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; HF_HUB_OFFLINE is set in all tests."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    _snapshot.cache_clear()
    return folder


def snapshot(cache: Path, name: str, revision: str = "main") -> Path:
    """The empty folder of a model's files in the cache."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(HASH)
    folder = home / "snapshots" / HASH
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def model(tiny_backbone: str) -> ColBERT:
    return ColBERT.from_backbone(tiny_backbone, SETTINGS, seed=3).eval()


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt != "onnx"])
def test_a_hub_id_keeps_its_projection(model: ColBERT, cache: Path, fmt: str) -> None:
    """Of each library's layout: the projection and the settings are those of the model, not drawn at random."""
    folder = snapshot(cache, f"someone/{fmt}")
    write_export(model, folder, fmt)
    (folder / "ckd_ray_export.json").unlink()
    loaded = load_any(f"someone/{fmt}", DEFAULTS)
    assert loaded.kind == {"colbert": "colbert-ai"}.get(fmt, fmt)
    assert torch.equal(loaded.model.projection.weight, model.projection.weight)
    assert loaded.model.settings == replace(SETTINGS, similarity=loaded.model.settings.similarity)
    for bare in (
        lambda: ColBERT.from_backbone(f"someone/{fmt}", DEFAULTS),
        lambda: PooledModel.from_backbone(f"someone/{fmt}"),
    ):
        with pytest.raises(UserError, match=rf"someone/{fmt}|model.backbone: a late-interaction \(ColBERT\) model"):
            bare()


def test_a_checkpoint_of_ours_and_a_bare_encoder_by_their_ids(
    model: ColBERT, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save(snapshot(cache, "someone/ours"))
    tiny_bert(snapshot(cache, "bare"))
    assert load_any("someone/ours", DEFAULTS).kind == "ckd-ray"
    assert not capsys.readouterr().err
    bare = load_any("bare", DEFAULTS)
    assert bare.kind == "encoder" and bare.model.settings == DEFAULTS
    assert "model.backbone: bare is a bare encoder by the files in the hub's cache" in capsys.readouterr().err
    assert PooledModel.from_backbone("bare").pooling == "mean"


def test_an_id_may_name_a_revision_and_a_folder_comes_before_the_hub(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = snapshot(cache, "someone/model", "v2")
    tiny_bert(folder)
    assert resolve_backbone("someone/model@v2") == str(folder)
    assert resolve_backbone(f"someone/model@{HASH}") == str(folder)
    with pytest.raises(UserError, match="neither a folder here nor a model that the hub gives"):
        resolve_backbone("someone/model")
    with pytest.raises(UserError, match=r"(?s)teacher\.checkpoint: neither a folder.*found: no-such/thing: "):
        load_any("no-such/thing", DEFAULTS, key="teacher.checkpoint")
    (tmp_path / "someone" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_backbone("someone/model") == "someone/model" and not is_hub_id("someone/model")


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All files but other programs' weights; a torch file of the encoder only where there are no safetensors."""
    asked: list[tuple[str, str | None, bool]] = []

    def download(repo_id: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        from huggingface_hub.utils import filter_repo_objects

        names = ["modules.json", "pytorch_model.bin", "1_Dense/pytorch_model.bin", "onnx/model.onnx", "tf_model.h5"]
        kept = set(filter_repo_objects(names, ignore_patterns=ignore_patterns))
        assert kept - {"pytorch_model.bin"} == {"modules.json", "1_Dense/pytorch_model.bin"}
        asked.append((repo_id, revision, "pytorch_model.bin" in kept))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    _snapshot.cache_clear()
    assert resolve_backbone("a/b") == resolve_backbone("a/b") == str(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    resolve_backbone("a/c@v1")
    _snapshot.cache_clear()
    assert asked == [("a/b", None, False), ("a/b", None, True), ("a/c", "v1", False)]


def test_a_weight_that_is_dropped_is_told_or_refused(
    model: ColBERT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a bare encoder: heads are silent, other weights are named, a projection or a missing weight is an error."""
    folder = Path(tiny_bert(tmp_path / "bert"))
    weights = load_file(folder / "model.safetensors")

    def with_more(**more: torch.Tensor) -> Path:
        save_file({**weights, **more}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    load_any(str(with_more(**{"cls.predictions.bias": torch.zeros(3)})), DEFAULTS)
    assert not capsys.readouterr().err
    load_any(str(with_more(**{"adapter.gate": torch.zeros(3)})), DEFAULTS)
    assert "the encoder has no place for 1 of its weights, which are not used: adapter.gate" in capsys.readouterr().err
    for name in ("linear.weight", "custom_text_proj.weight"):
        for load in (lambda source: load_any(source, DEFAULTS), PooledModel.from_backbone):
            with pytest.raises(UserError, match=rf"(?s)a model with a projection of its own.*found: {name}"):
                load(str(with_more(**{name: torch.zeros(16, 32)})))
    del weights["encoder.layer.1.output.dense.weight"]
    with pytest.raises(UserError, match="weights of the encoder are missing"):
        load_any(str(with_more()), DEFAULTS)


def test_a_dense_layer_of_pooled_vectors_is_named(model: ColBERT, tmp_path: Path, capsys: Any) -> None:
    folder = Path(tiny_bert(tmp_path / "st"))
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")]
    entries = [{"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"} for i, (k, p) in
               enumerate(kinds)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(entries))
    assert load_any(str(folder), DEFAULTS).kind == "encoder"
    assert f"{folder} has a Dense layer for its one vector a text, which is not used" in capsys.readouterr().err


class FakeApi:
    """What `push.py` uses of huggingface_hub.HfApi; keeps what it is given, as the hub does."""

    def __init__(self, token: str = "of the test") -> None:
        self.token = token
        self.made: dict[str, Any] = {}
        self.files: dict[str, str] = {}

    def whoami(self) -> dict[str, Any]:
        if not self.token:
            raise OSError("Invalid user token.")
        return {"name": "me"}

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> RepoUrl:
        if "/" not in repo_id:
            raise ValueError(f"not a repository: {repo_id}")
        self.made = {"repo_id": repo_id, "repo_type": repo_type, "private": private, "exist_ok": exist_ok}
        kind = "datasets/" if repo_type == "dataset" else ""
        return RepoUrl(f"https://huggingface.co/{kind}{repo_id}")

    def upload_folder(
        self,
        *,
        repo_id: str,
        repo_type: str,
        folder_path: str,
        commit_message: str,
        ignore_patterns: str,
        delete_patterns: str | None,
    ) -> None:
        from huggingface_hub.utils import filter_repo_objects

        assert (repo_id, repo_type) == (self.made["repo_id"], self.made["repo_type"]) and commit_message
        deleted = set(filter_repo_objects(self.files, allow_patterns=delete_patterns)) if delete_patterns else set()
        kept = {name: path for name, path in self.files.items() if name not in deleted}
        found = {p.relative_to(folder_path).as_posix(): str(p) for p in Path(folder_path).rglob("*") if p.is_file()}
        uploaded = filter_repo_objects(found, ignore_patterns=ignore_patterns)
        self.files = kept | {name: found[name] for name in uploaded}


def test_push(model: ColBERT, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    write_export(model, folder, "pylate")
    api = FakeApi()
    assert push_folder(str(folder), "me/model", api=api) == "https://huggingface.co/me/model"
    assert api.made == {"repo_id": "me/model", "repo_type": "model", "private": True, "exist_ok": True}
    assert {"modules.json", "1_Dense/model.safetensors", "config.json", "model.safetensors"} <= api.files.keys()
    assert push_folder(str(folder), "me/labels", "labels", api=api).startswith("https://huggingface.co/datasets/")
    assert api.made["repo_type"] == "dataset"
    with pytest.raises(UserError, match=r"(?s)--push model: the hub did not take.*not a repository.*the export is in"):
        push_folder(str(folder), "model", api=api)
    with pytest.raises(UserError, match="--push me/model: the hub did not take the export"):  # the real one, offline
        push_folder(str(folder), "me/model")


def test_a_data_set_is_replaced_and_a_model_is_added_to(tmp_path: Path) -> None:
    """A part of an earlier push would be read with those of this one; a licence beside a model is its owner's."""
    for name in ("part-000000.parquet", "part-000001.parquet", "_manifest.json"):
        (tmp_path / name).write_text("{}")
    api = FakeApi()
    push_folder(str(tmp_path), "me/vectors", "vectors", api=api)
    assert api.files.keys() == {"part-000000.parquet", "part-000001.parquet"}
    (tmp_path / "part-000001.parquet").unlink()
    push_folder(str(tmp_path), "me/vectors", "vectors", api=api)
    assert api.files.keys() == {"part-000000.parquet"}
    api.files = {"LICENSE": "theirs"}
    push_folder(str(tmp_path), "me/model", "model", api=api)
    assert api.files.keys() == {"LICENSE", "part-000000.parquet"}


@pytest.mark.parametrize("repo", ["model", "me/my model", "datasets/me/model", "me/--", ""])
def test_a_wrong_name_is_told_before_the_hub_is_asked(repo: str) -> None:
    api = FakeApi(token="")
    with pytest.raises(UserError, match=r"no name of a repository(.|\n)*expected: OWNER/NAME(.|\n)*nothing is written"):
        check_repository(repo, api=api)


def test_a_missing_token_is_told_before_the_export_is_made(
    model: ColBERT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ckd_ray.cli import main

    check_repository("me/model", api=FakeApi())
    with pytest.raises(UserError, match="--push me/model: the hub does not accept your token"):  # the real one, offline
        check_repository("me/model")
    model.save(tmp_path / "checkpoint")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: FakeApi(token=""))
    arguments = ["export", str(tmp_path / "checkpoint"), "--format", "pylate", "--push", "me/model"]
    monkeypatch.setattr("sys.argv", ["ckd-ray", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "found: Invalid user token" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_command_uploads_what_it_wrote(
    model: ColBERT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ckd_ray.cli import main

    model.save(tmp_path / "checkpoint")
    api = FakeApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    arguments = ["export", str(tmp_path / "checkpoint"), "--format", "pylate", "--push", "me/model", "--json"]
    monkeypatch.setattr("sys.argv", ["ckd-ray", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed["pushed"] == "https://huggingface.co/me/model" and "README.md" in api.files
    shutil.rmtree(printed["out"])


def head_of(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_card_says_what_hubs_read(cache: Path) -> None:
    config = {
        "run": {"name": "mine"},
        "model": {"backbone": "bert-base-uncased"},
        "teacher": {"checkpoint": None},
        "collection": {"path": "hf://datasets/zeta/NanoX@main/sub", "qrels": {"train": "hf://datasets/other/labels/x"}},
    }
    measures = {"dev": {"nDCG@10": 0.5, "R@100": 0.75, "MRR@10": 0.25}}
    card = model_card(SETTINGS, Facts("mine", "student", config, measures), "pylate")
    assert card.startswith("---\n# license: choose one\n")
    head = head_of(card)
    assert (head["base_model"], head["datasets"]) == ("bert-base-uncased", ["zeta/NanoX", "other/labels"])
    assert (head["library_name"], head["pipeline_tag"]) == ("PyLate", "sentence-similarity")
    assert "ColBERT" in head["tags"]
    (index,) = head["model-index"]
    (result,) = index["results"]
    assert index["name"] == "mine" and result["dataset"] == {"name": "sub", "type": "zeta/NanoX", "split": "dev"}
    assert {m["type"]: m["value"] for m in result["metrics"]} == {
        "ndcg_at_10": 0.5,
        "recall_at_100": 0.75,
        "mrr_at_10": 0.25,
    }
    config["teacher"] = {"checkpoint": "colbert-ir/colbertv2.0@v1"}  # the student starts from its weights
    assert head_of(model_card(SETTINGS, Facts("mine", config=config)))["base_model"] == "colbert-ir/colbertv2.0"
    config |= {"teacher": {}, "model": {"backbone": "/home/someone/bert"}, "collection": {"path": "/home/someone/d"}}
    private = model_card(SETTINGS, Facts("mine", config=config, measures=measures))
    assert "base_model" not in head_of(private) and "datasets" not in head_of(private) and "someone" not in private
