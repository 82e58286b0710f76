"""A run of ckd-ray 0.1 is of use to who has upgraded: every command works on it as it did, or refuses with what to do
and leaves the run as it was."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import yaml

from ckd_ray.checks import load_config
from ckd_ray.config import Config
from ckd_ray.errors import UserError
from ckd_ray.inspection.export_labels import export_labels
from ckd_ray.inspection.inspect import inspect_query
from ckd_ray.model import ColBERT
from ckd_ray.model.exchange import load_any
from ckd_ray.pipeline.export import export_run
from ckd_ray.pipeline.runner import run_stages
from ckd_ray.report.page import write_report
from ckd_ray.runs.finished import open_finished
from ckd_ray.search.searcher import Searcher
from tests.here import in_this_process
from tests.support import ALONE

KEPT = Path(__file__).parents[1] / "data" / "run-0.1.zip"
Found = TypeVar("Found")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A copy of the run; its collection and encoder lie beside it."""
    with zipfile.ZipFile(KEPT) as archive:
        archive.extractall(tmp_path)
    return tmp_path / "kept"


def works_or_says_what_to_do(run: Path, call: Callable[[], Found]) -> Found | None:
    """What the call returns; None when it is refused as promised."""
    before = _contents(run)
    try:
        return call()
    except UserError as error:
        assert error.where and error.fix, f"a refusal without what to do: {error}"
        assert _contents(run) == before, "a refusal has changed the run"
        return None


def _contents(run: Path) -> dict[str, str]:
    """SHA-256 of every file, but of locks."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and ".lock" not in path.name]
    return {path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ranked_then(run: Path, split: str) -> dict[str, list[str]]:
    """Passages of the student's ranking by query id, as version 0.1 wrote them."""
    found: dict[str, list[str]] = {}
    for line in (run / "evaluation" / f"student.{split}.run").read_text().splitlines():
        query, _, passage, *_ = line.split()
        found.setdefault(query, []).append(passage)
    return found


def asked(run: Path, split: str) -> dict[str, str]:
    lines = (run.parent / "collection" / f"queries.{split}.tsv").read_text().splitlines()
    return dict(line.split("\t", 1) for line in lines)


def searched(run: Path) -> dict[str, list[str]]:
    searcher = Searcher(open_finished(str(run)))
    return {q: [hit.passage_id for hit in searcher.search(text, 12)] for q, text in asked(run, "test").items()}


def test_a_search_finds_what_it_found_then(kept: Path) -> None:
    found = works_or_says_what_to_do(kept, lambda: searched(kept))
    assert found is None or found == ranked_then(kept, "test")


def test_a_report_has_its_measures(kept: Path) -> None:
    where = works_or_says_what_to_do(kept, lambda: write_report(open_finished(str(kept)), str(kept.parent / "r.html")))
    measured = json.loads((kept / "evaluation" / "measures.json").read_text())
    value = measured["splits"]["test"]["student"]["nDCG@10"]
    assert where is None or f"{value:.4f}" in Path(where).read_text()


def test_a_query_s_label_is_explained(kept: Path) -> None:
    query = next(iter(asked(kept, "train")))
    found = works_or_says_what_to_do(kept, lambda: inspect_query(str(kept), query, 5))
    assert found is None or (found["query_id"] == query and found["expansion"])


@pytest.mark.parametrize("what", ["model", "labels"])
def test_an_export_can_be_used(kept: Path, what: str) -> None:
    out = kept.parent / "out"
    if what == "labels":
        made = works_or_says_what_to_do(kept, lambda: export_labels(str(kept), "triples", out=str(out), width=4))
        assert made is None or made["queries"] == 8
        return
    if works_or_says_what_to_do(kept, lambda: export_run(str(kept), "sentence-transformers", out=str(out))):
        student = ColBERT.from_pretrained(str(kept / "student"))
        exported = load_any(str(out), student.settings).model
        for mine, theirs in zip(student.parameters(), exported.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def settings_then(kept: Path, **changed: object) -> Config:
    """The user's own YAML of that time, with the folders where they are now."""
    values = json.loads((kept / "run.json").read_text().replace("/data/", f"{kept.parent}/"))["config"]
    values["run"]["storage"] = str(kept.parent)
    for key, value in changed.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    path = kept.parent / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(str(path), list(ALONE))


def test_a_run_is_gone_on_with(kept: Path, ray_session: None) -> None:
    """The same command finds the run finished or makes what is missing. A changed setting gives another student."""
    texts = asked(kept, "test")
    with in_this_process():
        done = works_or_says_what_to_do(kept, lambda: run_stages(settings_then(kept)))
    if done is None:
        return
    assert {stage.name for stage in done} >= {"collection", "teacher", "label", "distill", "evaluate"}
    found = searched(kept)
    assert found == ranked_then(kept, "test") and found.keys() == texts.keys()
    student = (kept / "student" / "model.safetensors").read_bytes()
    with in_this_process():
        run_stages(settings_then(kept, distill__learning_rate=0.01))
    assert (kept / "student" / "model.safetensors").read_bytes() != student
    assert searched(kept) == ranked_then(kept, "test")
    assert open_finished(str(kept)).record["config"]["distill"]["learning_rate"] == 0.01
