"""What a run writes down about itself, and which versions of a run directory are opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckd_ray.checks import load_config
from ckd_ray.errors import JobError, UserError
from ckd_ray.files import write_json_atomic
from ckd_ray.pipeline import runner
from ckd_ray.pipeline.stage import Stage
from ckd_ray.runs.artifact import MANIFEST
from ckd_ray.runs.directory import RunContext, RunDir, labels_folder
from ckd_ray.runs.finished import open_finished
from ckd_ray.runs.record import SCHEMA, write_record


def context_of(storage: Path, *values: str, **places: str) -> RunContext:
    return RunContext.of(load_config(None, [f"run.storage={storage}", "run.name=r", *values]), **places)


def test_keys_in_uris_are_not_written_into_the_run(tmp_path: Path) -> None:
    values = ["collection.format=msmarco", "collection.path=s3://AKIAKEY:se/cret+1@bucket/data?region=eu-west-1"]
    write_record(context_of(tmp_path, *values))
    text = (tmp_path / "r" / "run.json").read_text()
    assert "AKIAKEY" not in text and "cret" not in text
    assert json.loads(text)["config"]["collection"]["path"] == "s3://***@bucket/data?region=eu-west-1"


def test_a_variant_opens_with_the_folders_of_its_run(tmp_path: Path) -> None:
    for variant in ("compare/collective-17", "tune/best"):
        context = context_of(tmp_path, variant=variant, labels="tune/labels-a")
        write_record(context)
        opened = open_finished(f"{tmp_path}/r/{variant}").paths
        assert opened == context.paths
        assert (opened.root, opened.folder) == (f"{tmp_path}/r", f"{tmp_path}/r/{variant}")
        assert opened.labels == f"{tmp_path}/r/tune/labels-a"


def test_a_run_directory_of_version_0_1_is_opened(tmp_path: Path) -> None:
    """Its run.json has no schema, and a search's winner does not say where its labels are."""
    record: dict[str, Any] = {"ckd_ray": "0.1.0", "config": {"label": {"clusters": 24}}}
    write_json_atomic(str(tmp_path / "r/run.json"), record)
    for label, labels in (({"clusters": 24}, "labels"), ({"clusters": 8}, labels_folder({"clusters": 8}))):
        write_json_atomic(str(tmp_path / "r/tune/best/run.json"), {"variant": "tune/best", "config": {"label": label}})
        assert open_finished(str(tmp_path / "r/tune/best")).paths == RunDir(f"{tmp_path}/r", "tune/best", labels)
    assert open_finished(str(tmp_path / "r")).paths == RunDir(f"{tmp_path}/r")
    write_record(context_of(tmp_path))  # and work in it goes on
    assert open_finished(str(tmp_path / "r")).record["schema"] == SCHEMA


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "2", None])
def test_a_run_directory_of_an_unknown_version_is_refused(tmp_path: Path, schema: Any) -> None:
    path = tmp_path / "r" / "run.json"
    write_json_atomic(str(path), {"schema": schema, "ckd_ray": "9.9", "config": {}})
    before = path.read_bytes()
    for refused in (lambda: open_finished(str(tmp_path / "r")), lambda: write_record(context_of(tmp_path))):
        with pytest.raises(UserError, match=rf"schema {SCHEMA} or earlier(.|\n)*ckd-ray 9\.9(.|\n)*run\.name"):
            refused()
    assert path.read_bytes() == before


def test_labels_of_a_record_do_not_lead_out_of_the_run(tmp_path: Path) -> None:
    write_json_atomic(str(tmp_path / "r/run.json"), {"schema": SCHEMA, "labels": "../elsewhere", "config": {}})
    with pytest.raises(UserError, match="leads out of its folder"):
        open_finished(str(tmp_path / "r"))


class Stages:
    """Three stages, of one file each: `collection`, `embed` and `evaluate`, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.contents = {"collection": "a", "embed": "b", "evaluate": "c"}
        self.stages = [
            self._stage("collection", (), lambda run: run.corpus),
            self._stage("embed", ("collection",), lambda run: run.embeddings),
            self._stage("evaluate", ("embed",), lambda run: run.evaluation),
        ]
        monkeypatch.setattr(runner, "needed", lambda config, until: self.stages)
        monkeypatch.setattr(runner, "_check_sizes", lambda context: None)
        monkeypatch.setattr("ckd_ray.data.source_signature", lambda settings: "source")

    def _stage(self, name: str, inputs: tuple[str, ...], output: Any) -> Stage:
        def run(context: RunContext, fingerprint: str) -> dict[str, Any]:
            self.ran.append(name)
            folder = Path(output(context.paths))
            (folder / "file.safetensors").write_text(self.contents[name])
            return {}

        return Stage(name, lambda config: inputs, output, lambda config: {}, run)


def test_damaged_files_are_made_again_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, config = Stages(monkeypatch), context_of(tmp_path).config
    assert [report.skipped for report in runner.run_stages(config)] == [False] * 3
    assert all(report.skipped for report in runner.run_stages(config))
    assert made.ran == ["collection", "embed", "evaluate"]

    damaged = tmp_path / "r/corpus/file.safetensors"
    damaged.write_text("x")  # of the same size: only its contents tell
    capsys.readouterr()
    reports = runner.run_stages(config, start="evaluate")
    assert [report.name for report in reports if not report.skipped] == ["collection", "evaluate"]
    assert f"{damaged}: its bytes do not match its checksum" in capsys.readouterr().err
    assert made.ran[3:] == ["collection", "evaluate"] and damaged.read_text() == "a"


def test_what_comes_out_differently_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a stage count, and not only its settings: on a GPU a training need not give the same again."""
    made, config = Stages(monkeypatch), context_of(tmp_path).config
    runner.run_stages(config)
    (tmp_path / "r/embeddings/file.safetensors").write_text("x")
    made.contents["embed"] = "d"
    reports = runner.run_stages(config, start="evaluate")
    assert [report.name for report in reports if not report.skipped] == ["embed", "evaluate"]
    (tmp_path / "r/corpus/file.safetensors").write_text("x")
    made.contents["collection"] = "e"
    reports = runner.run_stages(config, start="evaluate")
    assert not any(report.skipped for report in reports)


def test_storage_that_damages_every_file_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, config = Stages(monkeypatch), context_of(tmp_path).config
    real = runner.make

    def damaging(uri: str, *arguments: Any, **options: Any) -> bool:
        done = real(uri, *arguments, **options)
        (Path(uri) / "file.safetensors").write_text("?")
        return done

    monkeypatch.setattr(runner, "make", damaging)
    with pytest.raises(JobError, match="were damaged 21 times"):
        runner.run_stages(config)
    assert set(made.ran) == {"collection"} and not (tmp_path / "r/embeddings" / MANIFEST).exists()


def test_a_failure_with_broken_files_is_repaired_and_others_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, config = Stages(monkeypatch), context_of(tmp_path).config
    broken, failing = [1, 0], made.stages[2].run

    def fails_once(context: RunContext, fingerprint: str) -> dict[str, Any]:
        if made.ran.count("evaluate") < 1:
            made.ran.append("evaluate")
            raise RuntimeError("a shard cannot be read")
        return failing(context, fingerprint)

    object.__setattr__(made.stages[2], "run", fails_once)
    monkeypatch.setattr(runner, "remove_broken_files", lambda run: broken.pop(0))
    assert [report.skipped for report in runner.run_stages(config)] == [False] * 3
    made.ran.clear()
    with pytest.raises(RuntimeError, match="a shard cannot be read"):
        runner.run_stages(config, start="evaluate")
