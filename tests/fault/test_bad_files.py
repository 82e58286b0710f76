"""Every bad input of `bad_files.py` is told what is wrong with it, and the table in docs/ says what that is."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.evidence import hand_made_run
from tests.fault.bad_files import CASES, BadFile, Given, outcome, table
from tests.sound import FORMATS
from tests.support import write_collection

ROOT = Path(__file__).parents[2]
_OUTCOMES: dict[BadFile, str] = {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str) -> Path:
    collection = write_collection(tmp_path_factory.mktemp("c") / "collection")
    return hand_made_run(tmp_path_factory.mktemp("r") / "runs", tiny_backbone, collection)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_is_told_what_is_wrong(case: BadFile, run: Path, tiny_backbone: str, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    told = _OUTCOMES[case] = outcome(case, Given(tiny_backbone, run, tmp_path))
    kind, _, text = told.partition(": ")
    assert (kind == "0") == case.what.startswith("kept"), told
    assert len(text) > 15 and len(text) < 4000 and "Traceback" not in text
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before
    if case.reader in FORMATS and kind != "0":
        assert not list((tmp_path / "out").glob("**/*")), "neither a result nor a temporary folder"


def test_there_are_enough_and_each_once() -> None:
    assert len(CASES) >= 60 and len({case.name for case in CASES}) == len(CASES)
    readers = {*FORMATS, "ir_datasets", "scores", "TREC run", "configuration", "tune.space"}
    assert {case.reader for case in CASES} >= readers | {"checkpoint", ".dnn", "report", "search", "store"}


def test_the_table_is_current() -> None:
    """Libraries have a say in some messages, so it is compared under the versions that constraints.txt pins."""
    libraries = ("pyarrow", "torch", "transformers", "pydantic")
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    others = [name for name in libraries if not version(name).startswith(pins[name])]
    if others or len(_OUTCOMES) < len(CASES):
        pytest.skip(f"other versions of {', '.join(others)}" if others else "not all cases were run")
    fresh = "python -m tests.fault.bad_files --write docs/reference/bad_input.md"
    assert (ROOT / "docs" / "reference" / "bad_input.md").read_text() == table({c: _OUTCOMES[c] for c in CASES}), fresh
