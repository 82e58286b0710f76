"""What a run writes down about itself."""

from __future__ import annotations

import json
from pathlib import Path

from ckd_ray.checks import load_config
from ckd_ray.pipeline.runner import _record
from ckd_ray.runs.directory import RunContext
from ckd_ray.runs.finished import open_finished


def test_keys_in_uris_are_not_written_into_the_run(tmp_path: Path) -> None:
    values = ["collection.format=msmarco", "collection.path=s3://AKIAKEY:se/cret+1@bucket/data?region=eu-west-1"]
    context = RunContext.of(load_config(None, [f"run.storage={tmp_path}", "run.name=r", *values]))
    _record(context)
    text = (tmp_path / "r" / "run.json").read_text()
    assert "AKIAKEY" not in text and "cret" not in text
    assert json.loads(text)["config"]["collection"]["path"] == "s3://***@bucket/data?region=eu-west-1"


def test_a_variant_s_base_is_the_run(tmp_path: Path) -> None:
    for variant in ("compare/collective-17", "tune/best"):
        context = RunContext.of(load_config(None, [f"run.storage={tmp_path}", "run.name=r"]), variant)
        _record(context)
        opened = open_finished(f"{context.run}/{variant}")
        assert (opened.base, opened.folder) == (context.run, f"{context.run}/{variant}")
