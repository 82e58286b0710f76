"""What a finished command proposes to do next."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckd_ray.checks import load_config
from ckd_ray.pipeline.closing import next_commands


def test_the_commands_name_the_run_as_a_person_types_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    embedded = load_config(None, [])
    commands = [line.split("  ")[0] for line in next_commands(embedded, str(tmp_path / "runs" / "quickstart"))]
    assert commands == ["ckd-ray search runs/quickstart", "ckd-ray report runs/quickstart", "ckd-ray init DIR"]
    own = load_config(None, ["collection.format=beir", f"collection.path={tmp_path}"])
    first, _, last = (line.split("  ")[0] for line in next_commands(own, "s3://bucket/mine"))
    assert first == "ckd-ray search s3://bucket/mine"
    assert last == "ckd-ray export s3://bucket/mine --format pylate"
