"""An option of an export that would be ignored is an error; the defaults are those of the command's page."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from ckd_ray.api.run import Run
from ckd_ray.errors import UserError
from ckd_ray.pipeline.export import export
from ckd_ray.pipeline.export_options import export_options

DEFAULTS = {"model": "student", "width": 32, "scores": "auto", "bits": 4}
ASKED = {
    "model": {"model"},
    "labels": {"width", "scores"},
    "vectors": {"model"},
    "index": {"model", "bits"},
}


@pytest.mark.parametrize("what", ASKED)
@pytest.mark.parametrize("name", DEFAULTS)
def test_an_option_goes_with_what_it_changes(what: str, name: str) -> None:
    """Also with the value that is its default: the user asked for something that is not there."""
    given = {other: DEFAULTS[name] if other == name else None for other in DEFAULTS}
    if name in ASKED[what]:
        assert export_options(what, **given) == {name: DEFAULTS[name]}
        return
    with pytest.raises(
        UserError, match=rf"--{name}: this would be ignored(.|\n)*--what {what}(.|\n)*expected: --{name}"
    ):
        export_options(what, **given)


def test_all_of_them_are_named_and_none_is_needed() -> None:
    with pytest.raises(UserError) as raised:
        export_options("vectors", model="teacher", width=8, scores=None, bits=2)
    assert raised.value.where == "--width, --bits"
    assert raised.value.expected == "--width with --what labels; --bits with --what index"
    assert export_options("labels", model=None, width=None, scores=None, bits=None) == {}
    assert export_options("everything", model="student") == {"model": "student"}  # refused by `export` itself


def test_the_defaults_are_those_that_are_documented() -> None:
    used = inspect.signature(export).parameters
    assert {name: used[name].default for name in DEFAULTS} == DEFAULTS
    page = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text().split("## ckd-ray export")[1]
    rows: dict[str, Any] = {
        line.split("`")[1].strip("-"): line for line in page.splitlines() if line.startswith("| `--")
    }
    says = " ".join((inspect.getdoc(Run.export) or "").split())
    for name, value in DEFAULTS.items():
        assert rows[name].endswith(f"Default: {value}. |"), rows[name]
    for told in ("`student` (the default)", "candidates a query (32)", "`auto` (the default)", "4 a dimension (4)"):
        assert told in says


def test_nothing_starts_with_an_option_that_would_be_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ckd_ray.cli import main

    monkeypatch.setattr("sys.argv", ["ckd-ray", "export", str(tmp_path), "--format", "pylate", "--width", "8"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "--width: this would be ignored" in capsys.readouterr().err
