"""Every mistake of `mistakes.py` ends with status 2 (1 for a full disk), its message and no traceback, and the page has
that message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.mistakes import ALL, Mistake, lay_out, meet, row, told
from tests.evidence import hand_made_run
from tests.support import write_collection

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str) -> Path:
    collection = write_collection(tmp_path_factory.mktemp("c") / "collection")
    return hand_made_run(tmp_path_factory.mktemp("r") / "runs", tiny_backbone, collection)


@pytest.mark.parametrize("mistake", ALL, ids=[re.sub(r"\W+", "-", mistake.what) for mistake in ALL])
def test_the_message_says_what_is_wrong(
    mistake: Mistake,
    run: Path,
    tiny_backbone: str,
    tiny_collection: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The files of the user stay as they are."""
    lay_out(tmp_path, tiny_backbone, run, Path(tiny_collection))
    mistake.make(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    if mistake.ray:
        request.getfixturevalue("ray_session")
    status, text = meet(mistake, tmp_path)
    assert status == mistake.status, text
    assert mistake.says in " ".join(text.split()) and "Traceback" not in text, text
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()} == before
    message = told(text, tmp_path)
    assert row(mistake, message, status) in PAGE.read_text(), (
        f"python -m tests.cli.mistakes --write docs/reference/errors.md\n{message}"
    )


def test_the_page_has_these_mistakes_and_no_others() -> None:
    assert len(ALL) >= 40 and len({mistake.what for mistake in ALL}) == len(ALL)
    rows = [line for line in PAGE.read_text().splitlines() if re.match(r"\| .* \| \d \|", line)]
    assert len(rows) == len(ALL)
