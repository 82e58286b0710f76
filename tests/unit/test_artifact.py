"""Artefacts: what their manifest vouches for, and what becomes of files that were altered since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ckd_ray.runs import artifact as artifact, digests
from ckd_ray.runs.artifact import identity_of, is_made, make, manifest_of, remove_altered, reopen
from tests.support import flip_bit


def filled(folder: Path) -> Path:
    """An artifact with two files, one of them in a folder, and a store."""

    def work() -> None:
        (folder / "runs").mkdir(exist_ok=True)
        (folder / "passages").mkdir(exist_ok=True)
        for name, text in {
            "a": "first",
            "runs/b": "second",
            "passages/shard-0": "s",
            "passages/manifest.json": "{}",
        }.items():
            (folder / name).write_text(text)

    assert make(str(folder), "f", work)  # type: ignore[arg-type]
    return folder


def test_the_manifest_has_the_digest_of_every_file_outside_stores(tmp_path: Path) -> None:
    manifest = manifest_of(str(filled(tmp_path / "artifact")))
    assert manifest is not None
    found = {entry["name"]: entry.get("sha256") for entry in manifest["files"]}
    expected = {name: hashlib.sha256(text).hexdigest() for name, text in (("a", b"first"), ("runs/b", b"second"))}
    assert found == expected | {"passages/shard-0": None, "passages/manifest.json": None}


def test_an_altered_file_is_named_and_removed_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = filled(tmp_path / "artifact")
    assert remove_altered(str(folder)) == []
    flip_bit(folder / "runs" / "b", 3)
    assert is_made(str(folder), "f"), "of the same size: only reading tells"
    assert remove_altered(str(folder)) == ["runs/b"]
    assert f"{folder}/runs/b: its bytes do not match its checksum" in capsys.readouterr().err
    assert (folder / "a").exists() and not (folder / "runs" / "b").exists()
    assert not is_made(str(folder), "f")
    filled(folder)
    assert (folder / "runs" / "b").read_text() == "second"


def test_missing_files_and_those_of_another_size_are_told_too(tmp_path: Path) -> None:
    folder = filled(tmp_path / "artifact")
    (folder / "a").unlink()
    (folder / "runs" / "b").write_text("longer than it was")
    assert remove_altered(str(folder)) == ["a", "runs/b"]


def test_a_manifest_without_digests_vouches_for_sizes(tmp_path: Path) -> None:
    folder = filled(tmp_path / "artifact")
    manifest = json.loads((folder / "_manifest.json").read_text())
    for entry in manifest["files"]:
        entry.pop("sha256", None)
    (folder / "_manifest.json").write_text(json.dumps(manifest))
    flip_bit(folder / "a", 0)
    assert remove_altered(str(folder)) == []


def test_a_read_that_went_wrong_once_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reads = filled(tmp_path / "artifact"), list[str]()

    def once_wrong(uri: str, sizes: Mapping[str, int]) -> dict[str, str]:
        reads.extend(sizes)
        found = digests.digests_of(uri, sizes)
        return found | ({"a": "0"} if reads.count("a") == 1 else {})

    monkeypatch.setattr(artifact, "digests_of", once_wrong)
    assert remove_altered(str(folder)) == [] and reads.count("a") == 2


def test_a_folder_that_is_replaced_stays_until_then(tmp_path: Path) -> None:
    folder = filled(tmp_path / "artifact")
    with pytest.raises(ValueError, match="cannot be read"):
        make(str(folder), "g", failing, replace_atomically=True)
    assert is_made(str(folder), "f")
    with pytest.raises(ValueError, match="cannot be read"):
        make(str(folder), "g", failing)
    assert not is_made(str(folder), "f") and not (folder / "a").exists()


def failing() -> dict[str, Any]:
    raise ValueError("the input cannot be read")


def test_a_killed_command_leaves_a_folder_to_go_on_in(tmp_path: Path) -> None:
    """Killed between writing the one and removing the other of _manifest.json and _making.json, at either end."""
    folder = filled(tmp_path / "artifact")
    (folder / "_making.json").write_text(json.dumps({"made_of": "f"}))
    assert is_made(str(folder), "f")
    (folder / "a").write_text("cut")
    kept = (folder / "passages" / "shard-0").stat().st_mtime_ns
    found: list[bool] = []

    def work() -> None:
        found.extend((folder / name).exists() for name in ("a", "runs/b", "passages/shard-0"))
        (folder / "a").write_text("first")

    assert make(str(folder), "f", work)  # type: ignore[arg-type]
    assert found == [False, True, True] and (folder / "passages" / "shard-0").stat().st_mtime_ns == kept
    assert not (folder / "_making.json").exists()


def test_a_reopened_artifact_gets_further_files(tmp_path: Path) -> None:
    folder = filled(tmp_path / "artifact")
    reopen(str(folder))
    assert not is_made(str(folder), "f")
    assert make(str(folder), "f", lambda: (folder / "c").write_text("more") and None)
    assert {"a", "c", "runs/b"} <= {entry["name"] for entry in (manifest_of(str(folder)) or {})["files"]}


def test_other_weights_are_another_artifact(tmp_path: Path) -> None:
    identities = []
    for number, (weights, log) in enumerate((("w", "1"), ("w", "2"), ("v", "1"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.safetensors").write_text(weights)
        (folder / "metrics.jsonl").write_text(log)
        make(str(folder), "f", lambda: None, replace_atomically=True)
        identities.append(identity_of(str(folder)))
    assert identities[0] == identities[1] != identities[2]
    assert identity_of(str(filled(tmp_path / "without"))) == "f"


def test_many_bytes_are_read_in_tasks(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_BYTES_A_TASK", 10)
    texts = {f"f{i}": f"text {i}".encode() for i in range(7)}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    sizes = {name: len(text) for name, text in texts.items()}
    assert [len(group) for group in digests._groups(sizes)] == [1] * 7
    assert digests.digests_of(str(tmp_path), sizes) == {n: hashlib.sha256(t).hexdigest() for n, t in texts.items()}


def test_groups_hold_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_BYTES_A_TASK", 10)
    assert digests._groups({"a": 4, "b": 6, "c": 1, "d": 30, "e": 2}) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert digests._groups({}) == []
