"""Names in manifests, indexes and archives stay in their folder; keys stay out of records; terminals stay whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckd_ray.cli.command import fail
from ckd_ray.data import Collection
from ckd_ray.errors import UserError
from ckd_ray.evaluate.against import Side, compare_runs
from ckd_ray.files import check_inside, delete_inside
from ckd_ray.files.cache import FOLDER_VARIABLE, ShardCache
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.exchange import load_any
from ckd_ray.model.sources import resolve_backbone
from ckd_ray.progress import printable, say, without_keys, without_secrets
from ckd_ray.runs.artifact import make
from ckd_ray.runs.directory import RunDir
from ckd_ray.runs.finished import FinishedRun
from ckd_ray.tune.records import Records, Trial

SETTINGS = ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)
OUT = ["../precious", "../../out/precious", "a/../../precious", "/etc/passwd", "..\\precious", "", "x\0y", "a/.."]


@pytest.mark.parametrize("name", OUT)
def test_names_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="a name leads out of its folder"):
        check_inside(["passages/ok", name], "here")


def test_names_with_dots_are_names() -> None:
    check_inside(["a..b", "...", "passages/shard-0.arrow", ".hidden"], "here")


@pytest.mark.parametrize("name", ["../precious", "ABSOLUTE", "link/precious"])
def test_a_manifest_deletes_nothing_elsewhere(tmp_path: Path, name: str) -> None:
    """A damaged file of an artifact is removed before it is made again; the manifest may have come from anybody."""
    folder, precious = tmp_path / "run" / "artifact", tmp_path / "run" / "precious"
    folder.mkdir(parents=True)
    precious.write_text("mine")
    (folder / "link").symlink_to(tmp_path / "run")
    named = str(precious) if name == "ABSOLUTE" else name
    files = [{"name": named, "bytes": 1}]
    (folder / "_manifest.json").write_text(json.dumps({"made_of": "f", "files": files}))
    with pytest.raises(UserError, match="leads out of its folder"):
        make(str(folder), "f", lambda: None)
    assert precious.read_text() == "mine"


def test_a_linked_artifact_is_an_artifact(tmp_path: Path) -> None:
    """People put `embeddings/` on another disk; the folder itself may be a link, what it holds is looked at."""
    (tmp_path / "disk" / "passages").mkdir(parents=True)
    (tmp_path / "disk" / "passages" / "x").write_text("1")
    (tmp_path / "embeddings").symlink_to(tmp_path / "disk")
    delete_inside(str(tmp_path / "embeddings"), "passages/x")
    assert not (tmp_path / "disk" / "passages" / "x").exists()


@pytest.mark.parametrize("files", ["x", [1], [{"name": "a"}], [{"name": "a", "bytes": "many"}], {"a": 1}])
def test_a_damaged_list_of_files_is_said(tmp_path: Path, files: object) -> None:
    (tmp_path / "_manifest.json").write_text(json.dumps({"made_of": "f", "files": files}))
    with pytest.raises(UserError, match="its list of files is damaged"):
        make(str(tmp_path), "f", lambda: None)


@pytest.mark.parametrize("splits", [{"../../x": {}}, {"train": {}, "/etc/passwd": {}}, ["train"], None])
def test_a_collection_s_splits_are_no_paths(tmp_path: Path, splits: object) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "_manifest.json").write_text(json.dumps({"rows": 1, "splits": splits}))
    with pytest.raises(UserError, match="not a collection's manifest"):
        Collection.open(str(tmp_path))


def test_weights_come_from_their_own_folder(tmp_path: Path, tiny_backbone: str) -> None:
    ColBERT.from_backbone(tiny_backbone, SETTINGS).save(tmp_path / "ours")
    for name, content in (
        ("model.safetensors.index.json", {"weight_map": {"a": "../ours/model.safetensors"}}),
        ("pytorch_model.bin.index.json", {"weight_map": {"a": "/etc/passwd"}}),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        for file in Path(tiny_backbone).iterdir():
            if file.name != "model.safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        (folder / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match="an index names weights outside of its folder"):
            load_any(str(folder), SETTINGS)


@pytest.mark.parametrize(
    "source", ["package:pydantic/../../..", "package:pydantic//etc", "package:../x/y", "package:os/x"]
)
def test_a_package_s_models_lie_in_the_package(source: str) -> None:
    with pytest.raises(UserError):
        resolve_backbone(source)


def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    ShardCache.of_this_machine()
    folder.chmod(0o777)
    with pytest.raises(UserError, match="others can write to the cache"):
        ShardCache.of_this_machine()
    folder.chmod(0o700)
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
        with pytest.raises(UserError, match="user 12345"):
            ShardCache.of_this_machine()


SECRETS = [
    ("s3://AKIA:se/cr+et@bucket/run?region=eu", "s3://***@bucket/run?region=eu"),
    ("abfs://:password@account/run", "abfs://***@account/run"),
    (
        "s3://bucket/x?access_key=A1&secret_key=s3cr&scheme=http",
        "s3://bucket/x?access_key=***&secret_key=***&scheme=http",
    ),
    ("https://host/x?sig=abc&v=1", "https://host/x?sig=***&v=1"),
    ("see https://user:pw@host/a and gs://b/c", "see https://***@host/a and gs://b/c"),
    ("s3://bucket/monkey?endpoint_override=h:1", "s3://bucket/monkey?endpoint_override=h:1"),
    ("plain words: a=b@c", "plain words: a=b@c"),
]


@pytest.mark.parametrize(("text", "shown"), SECRETS)
def test_keys_are_hidden(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_records_hide_keys_and_keep_texts() -> None:
    value = {"run": "s3://k:s@b/run", "rows": [1, {"text": "ask http://a:b@c please", "id": "q://x"}], "none": None}
    expected = {"run": "s3://***@b/run", "rows": [1, {"text": "ask http://a:b@c please", "id": "q://x"}], "none": None}
    assert without_keys(value) == expected


def test_what_a_run_writes_holds_no_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A comparison with a run elsewhere, a trial that failed, and the last words of a command."""
    where = "s3://key:secret@bucket/other"
    sides = [
        Side(FinishedRun(RunDir(folder), {}), "student", {}, {"dev": {"MRR@10": {"q1": 0.5, "q2": 1.0}}})
        for folder in (where, str(tmp_path))
    ]
    (tmp_path / "evaluation").mkdir()
    compare_runs(sides[0], sides[1])
    records = Records(str(tmp_path / "trials"))
    records.end(Trial(0, {}), "failed", f"{where}/shard: broken")
    assert fail(f"{where} failed", 1) == 1
    say(where)
    told = capsys.readouterr().err + "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    assert told.count("s3://***@bucket") >= 4 and "secret" not in told


def test_a_terminal_is_shown_no_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "a \x1b[31mred\x07 \x9b2J \u202etxet\ud800\r"
    assert printable(evil + "\n\tok") == "a ?[31mred? ?2J ?txet??\n\tok"
    say(evil)
    fail(evil, 2)
    import ckd_ray.inspection.inspect
    from ckd_ray.cli.look import inspect

    monkeypatch.setattr(ckd_ray.inspection.inspect, "inspect_query", lambda *_: SimpleNamespace())
    monkeypatch.setattr(ckd_ray.inspection.inspect, "render", lambda _: evil)
    inspect(run="run", query_id="q", top=1, json_=False, quiet=False)
    told = capsys.readouterr().err
    assert told.count("red") == 3 and not any(c in told for c in "\x1b\x07\x9b\u202e\ud800\r")
