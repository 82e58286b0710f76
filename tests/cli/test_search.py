"""`ckd-ray search` and the scan behind it, on a run made by hand: no Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_ray.errors import UserError
from ckd_ray.model.tokenizer import ColBERTTokenizer
from ckd_ray.runs.finished import open_finished
from ckd_ray.search import scan as scanning, searcher as searching
from ckd_ray.search.index import SearchIndex
from ckd_ray.search.scan import scan, winners
from ckd_ray.search.searcher import Hit, Match, Searcher, token_spans
from ckd_ray.search.show import effort, marked_spans, render_hit, window
from tests.evidence import evil_collection, hand_made_run
from tests.support import WORDS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str) -> Path:
    collection = evil_collection(tmp_path_factory.mktemp("collection"))
    return hand_made_run(tmp_path_factory.mktemp("runs"), tiny_backbone, collection)


@pytest.fixture(scope="module")
def searcher(run: Path) -> Searcher:
    return Searcher(open_finished(str(run)))


def call(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckd_ray", "search", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=200)


def test_the_scan_is_the_literal_maximum_over_all_passages(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "_BLOCK_ROWS", 37)  # several blocks a shard, and passages longer than a block
    rows_QD = searcher.encoder.queries(["banel cim kost"]).embeddings_TD.float()
    documents = searcher.store.gather(np.arange(60)).split()
    literal = np.array([sum(max(float(q @ d) for d in rows.float()) for q in rows_QD) for rows in documents])
    scores, passages = scan(searcher.store, rows_QD, 70)
    assert passages.tolist() == np.lexsort((np.arange(60), -scores[np.argsort(passages)])).tolist()
    assert np.allclose(scores, np.sort(literal)[::-1], atol=1e-4)
    assert np.allclose(scan(searcher.store, rows_QD, 3)[0], scores[:3])


def test_an_index_finds_the_candidates_of_a_large_store(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With candidates enough, its results are those of the scan. A store that is made anew gets a new index."""
    exact = Searcher(open_finished(str(run)))
    assert exact.index is None, "none is made unasked"
    searcher = Searcher(open_finished(str(run)), index="make")
    assert searcher.index is not None
    assert Searcher(open_finished(str(run)), index="none").index is None
    made = (run / "search_index" / "student" / "passages.npy").stat().st_mtime_ns
    again = Searcher(open_finished(str(run)), index="make")
    assert Searcher(open_finished(str(run))).index is not None
    assert (run / "search_index" / "student" / "passages.npy").stat().st_mtime_ns == made
    for query in ("banel cim kost", "no word of it", "<script>"):
        expected = exact.search(query, 60)
        for one in (searcher, again):
            found = one.search(query, 60)
            assert [hit.passage_id for hit in found] == [hit.passage_id for hit in expected]
            assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    monkeypatch.setattr(searching, "_LEAST_CANDIDATES", 0)
    few = searcher.search("banel cim kost", 1)
    assert len(few) == 1 and few[0].score <= exact.search("banel cim kost", 1)[0].score + 1e-5
    monkeypatch.setitem(exact.store.manifest, "fingerprint", "another store")
    assert SearchIndex.open(str(run / "search_index" / "student"), exact.store) is None
    SearchIndex.make(str(run / "search_index" / "student"), exact.store)
    assert (run / "search_index" / "student" / "passages.npy").stat().st_mtime_ns != made


def test_an_index_that_cannot_be_written_is_an_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> SearchIndex:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(SearchIndex, "make", refuse)
    with pytest.raises(UserError, match=r"the index cannot be written(.|\n)*Permission denied"):
        Searcher(open_finished(str(run)), index="make")


def test_the_winning_tokens_are_those_of_the_text(searcher: Searcher) -> None:
    text = searcher.collection.texts([7])[0]
    word = text.split()[2].strip(".")
    hit = next(h for h in searcher.search(f"{word} {word}", 60) if h.passage_id == "p7")
    assert [m.query_token for m in hit.matches] == [word, word]
    rows = searcher.store.gather(np.array([7])).split()[0].float()
    encoded = searcher.encoder.queries([f"{word} {word}"]).embeddings_TD.float()
    spans = token_spans(searcher.encoder.model.tokenizer, text, searcher.store.gather(np.array([7])).token_ids)
    for row, match in zip(encoded[2:4], hit.matches, strict=True):  # rows 0 and 1 are [CLS] and [Q]
        best = int((rows @ row).argmax())
        assert (match.start, match.end) == spans[best]
        assert match.similarity == pytest.approx(float((rows @ row).max()), abs=1e-4)
        if match.end:
            assert text[match.start : match.end].lower() == match.passage_token
    assert token_spans(searcher.encoder.model.tokenizer, "another text", np.array([1, 2])) == [(0, 0), (0, 0)]


def test_words_of_a_model_without_markers(searcher: Searcher, tmp_path: Path) -> None:
    """As sentence-transformers and PyLate may have them."""
    model = searcher.encoder.model
    plain = ColBERTTokenizer(model.tokenizer.hf, replace(model.settings, query_marker="", doc_marker="", doc_maxlen=12))
    text = " ".join(WORDS[:20])
    (token_ids,) = plain.passages([text])
    spans = token_spans(plain, text, token_ids)
    assert [text[a:b] for a, b in spans] == ["", *WORDS[:10], ""]


def test_winners_of_nothing_and_of_ties() -> None:
    assert winners(torch.empty(0, 2), torch.ones(3, 2))[0].tolist() == [-1, -1, -1]
    at, similarity = winners(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert (at.tolist(), similarity.tolist()) == ([1], [1.0])


def hit(text: str, *spans: tuple[int, int]) -> Hit:
    return Hit(1, "p1", 2.5, text, [Match("q", "p", a, b, 0.5) for a, b in spans])


def test_marks_are_joined_and_shown_in_brackets_or_colour() -> None:
    found = hit("hives are itchy welts", (0, 3), (3, 5), (10, 15), (0, 0))
    assert marked_spans(found) == [(0, 5), (10, 15)]
    assert render_hit(found, colour=False) == "   1  p1  2.500\n      [hives] are [itchy] welts"
    assert "\x1b[1;33mhives\x1b[0m are" in render_hit(found, colour=True)


def test_the_window_holds_the_marks() -> None:
    text = "word " * 100 + "hives are itchy " + "word " * 100
    spans = [(500, 505), (510, 515)]
    start, stop = window(text, spans, 60)
    assert start <= 500 and stop >= 515 and stop - start <= 60
    shown = render_hit(hit(text, *spans), colour=False, width=60)
    assert "[hives] are [itchy]" in shown and "... " in shown and " ..." in shown
    assert window("short", [], 60) == (0, 5)
    assert render_hit(hit(""), colour=False).endswith("(no text)")


def test_a_passage_cannot_write_to_the_terminal() -> None:
    shown = render_hit(hit("a \x1b[31mred\x07 \x9b2J \u202etxet", (2, 6)), colour=False)
    assert not any(c in shown for c in "\x1b\x07\x9b\u202e")


def test_large_stores_are_announced() -> None:
    assert effort(1_700_000, 2**29) is None
    assert "143.1 GiB" in str(effort(600_000_000, 153_600_000_000))


def test_one_shot_as_json_and_for_people(run: Path) -> None:
    done = call(str(run), "banel <script> cim", "--top", "60", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [h["rank"] for h in found["hits"]] == list(range(1, 61))
    scores = [h["score"] for h in found["hits"]]
    assert scores == sorted(scores, reverse=True) and set(found["hits"][0]["matches"][0]) >= {"query_token", "start"}
    piped = call(str(run), text="banel\nkost lim\nexit\nnever asked\n")
    assert piped.returncode == 0 and piped.stdout.count("query: ") == 2 and "\x1b" not in piped.stdout
    assert "[banel]" in piped.stdout or "[" in piped.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/at/all", "x"], "no run here"),
        (["RUN", "  "], "the query is empty"),
        (["RUN", "--json"], "--json needs a query"),
        (["RUN", "x", "--system", "nobody"], "student or teacher"),
    ],
)
def test_wrong_input(run: Path, arguments: list[str], message: str) -> None:
    from typer.testing import CliRunner

    from ckd_ray.cli import app

    done = CliRunner().invoke(app, ["search", *(str(run) if a == "RUN" else a for a in arguments)])
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--against", "/nowhere/at/all"], "no run here"),
        (["evaluate", "--against", "RUN", "--system", "nobody"], "student or teacher"),
        (["report", "/nowhere/at/all"], "no run here"),
        (["compare", "--set", "compare.seeds=[]"], "compare.seeds"),
    ],
)
def test_wrong_input_of_the_other_commands(run: Path, arguments: list[str], message: str) -> None:
    """Refused before Ray starts."""
    from typer.testing import CliRunner

    from ckd_ray.cli import app

    done = CliRunner().invoke(app, [str(run) if a == "RUN" else a for a in arguments])
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output


def test_a_run_without_a_student_says_what_makes_one(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text((run / "run.json").read_text())
    with pytest.raises(UserError, match="no student to search with yet"):
        Searcher(open_finished(str(tmp_path)))
