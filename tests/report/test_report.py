"""The page: complete, escaped, self-contained, and without an error in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape

from ckd_ray.checks import load_config
from ckd_ray.compare.table import System, build_table
from ckd_ray.data import Collection, build_collection
from ckd_ray.report.facts import gather
from ckd_ray.report.page import render_page, write_report
from ckd_ray.report.plots import Interval, Series, histogram, intervals, lines, number, thinned, ticks
from ckd_ray.report.wins import examples, extremes, read_ranked
from ckd_ray.runs.finished import open_finished
from tests.evidence import EVIL_ID, evil_collection, hand_made_run
from tests.support import write_collection


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str) -> Path:
    collection = evil_collection(tmp_path_factory.mktemp("collection"))
    made = hand_made_run(tmp_path_factory.mktemp("runs"), tiny_backbone, collection)
    rng = np.random.default_rng(0)
    systems = [System("bm25", [], {"dev": {"MRR@10": rng.random((1, 6))}})]
    for name in ("contrastive", "<b>collective</b>"):
        systems.append(System(name, [1, 2], {"dev": {"MRR@10": rng.random((2, 6))}}, 60.0, 5.0))
    table = {**build_table(systems, 24), "budget": {"steps": 300}}
    (made / "compare").mkdir()
    (made / "compare" / "table.json").write_text(json.dumps(table))
    (made / "tune").mkdir()
    baseline = made / "baselines" / "encoder"  # as if the encoder as it is ranked like the teacher
    baseline.mkdir(parents=True)
    for path in (made / "evaluation").glob("teacher.*"):
        shutil.copy(path, baseline / path.name.replace("teacher", "encoder"))
    (made / "tune" / "summary.json").write_text(json.dumps(search()))
    return made


def search() -> dict:
    """What a search of four trials leaves: one stopped, one failed with a cause that is no HTML."""
    rows = [(0, "finished", 0.50, 0.25, "collection"), (1, "stopped", 0.31, 4.0, "<i>feedback</i>")]
    rows += [(2, "finished", 0.62, 1.5, "collection"), (3, "failed", None, 8.0, "collection")]
    trials = [
        {
            "trial": n, "state": state, "mrr@10": value, "steps": 60, "seconds": 30.0, "distill.temperature": t,
            "label.token_vote": vote, "cause": "<script>alert(1)</script>" if state == "failed" else None,
        }
        for n, state, value, t, vote in rows
    ]  # fmt: skip
    default = {"distill.temperature": 0.25, "label.token_vote": "collection"}
    return {
        "trials": trials,
        "best": {"trial": 2, "mrr@10": 0.62, "distill.temperature": 1.5, "label.token_vote": "collection"},
        "default": default,
        "importance": {"distill.temperature": 0.9, "label.token_vote": 0.1},
        "agreement": {"spearman": 0.5, "combinations": 4},
        "saved": {"share": 0.75},
    }


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return Path(write_report(open_finished(str(run)))).read_text()


class Elements(HTMLParser):
    """Tags, their attributes, and what is open at the end."""

    void = frozenset(("meta", "link", "input", "br", "img", "hr"))
    # What HTML lets one leave open.
    free = frozenset(("th", "td", "tr", "li", "p", "line", "circle", "rect", "polyline"))

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void | self.free:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void | self.free:
            assert self.open and self.open.pop() == tag, tag


def parsed(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    return elements


HOSTILE = "</script></pre></title><script>alert(9)</script><img src=x onerror=alert(8)>\" onload=\"x' autofocus='"
# Every element that a page is made of.
KNOWN = {
    "a", "b", "body", "br", "button", "circle", "code", "details", "div", "figcaption", "figure", "footer", "g", "h1",
    "h2", "h3", "head", "header", "html", "i", "input", "li", "line", "link", "main", "meta", "nav", "ol", "p",
    "polyline", "pre", "rect", "script", "section", "span", "style", "summary", "svg", "table", "tbody", "td", "text",
    "th", "thead", "title", "tr",
}  # fmt: skip


def hostile(value: object) -> object:
    """A JSON value in which every text is followed by markup that must stay text."""
    if isinstance(value, dict):
        return {key: hostile(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner) for inner in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_every_text_of_a_run_stays_text(run: Path, tmp_path: Path) -> None:
    """Names, settings, causes, units, versions: whatever is read from the run's records is shown, never obeyed."""
    folder = tmp_path / "<script>alert(7)<"
    shutil.copytree(run, folder)
    keep = {"corpus", "embeddings", "student_embeddings", "teacher", "student"}
    for path in folder.rglob("*.json"):
        if path.relative_to(folder).parts[0] not in keep:
            path.write_text(json.dumps(hostile(json.loads(path.read_text()))))
    summary = json.loads((folder / "tune" / "summary.json").read_text())
    summary["trials"][0]["trial"] = summary["best"]["trial"] = HOSTILE
    (folder / "tune" / "summary.json").write_text(json.dumps(summary))
    record = json.loads((folder / "run.json").read_text())
    record["config"]["run"]["storage"] = "s3://key:hidden@bucket/x"
    (folder / "run.json").write_text(json.dumps(record))
    page = render_page(gather(open_finished(str(folder))))
    elements = parsed(page)
    assert {tag for tag, _ in elements.tags} <= KNOWN
    assert [tag for tag, _ in elements.tags].count("script") == 1 and "hidden@" not in page
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
    assert not [name for _, attributes in elements.tags for name in attributes if name in ("autofocus", "src")]
    assert page.count(escape(HOSTILE)) > 20


def test_passages_that_were_set_aside_are_named(run: Path) -> None:
    figures = {"count": 60, "unit": "passages", "set_aside": ["p17", "<p42>"]}
    stages = [{"name": "embed", "folder": "embeddings", "seconds": 1.0, "figures": figures}]
    page = render_page(dataclasses.replace(gather(open_finished(str(run))), stages=stages))
    text = " ".join(page.split())
    assert "embed: 2 passages could not be encoded and were set aside" in text and "&lt;p42&gt;" in text


def test_the_page_is_whole_and_needs_nothing_else(page: str) -> None:
    elements = parsed(page)
    assert elements.open == []
    sections = [a["id"] for tag, a in elements.tags if tag == "section"]
    assert sections == ["wins", "table", "comparison", "search", "curves", "stages", "environment"]
    for _, attributes in elements.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            assert name not in ("src", "srcset") and not (name == "href" and not str(value).startswith(("#", "data:,")))
    assert "url(" not in page and "@import" not in page and "default-src 'none'" in page
    assert [tag for tag, _ in elements.tags].count("script") == 1


def test_nothing_from_the_collection_becomes_markup(page: str) -> None:
    assert EVIL_ID not in page and escape(EVIL_ID) in page
    assert "<img" not in page and "&lt;img src=x onerror=alert(2)&gt;" in page
    assert "<b>collective" not in page and "&lt;b&gt;collective&lt;/b&gt;" in page


def test_the_numbers_are_those_of_the_run(run: Path, page: str) -> None:
    comparison = json.loads((run / "evaluation" / "comparison.json").read_text())
    text = re.sub(r"<[^>]+>", " ", page)
    for rows in comparison.values():
        for row in rows.values():
            assert f"{row['student']:.4f}" in text and f"{row['difference_mean']:+.4f}" in text
    table = json.loads((run / "evaluation" / "table.json").read_text())
    for rows in table["splits"].values():
        for row in rows.values():
            for cell in row["systems"].values():
                assert f"{cell['mean']:.4f} [{cell['low']:.4f}, {cell['high']:.4f}]" in re.sub(r"\s+", " ", text)
            for difference in row["student_minus"].values():
                assert f"{difference['mean']:+.4f}" in text and f"{difference['p_holm']:.4f}" in text
    facts = gather(open_finished(str(run)))
    per_query = {
        name: json.loads((run / "evaluation" / f"{name}.dev.per_query.json").read_text())["MRR@10"]
        for name in ("teacher", "student")
    }
    assert [(w.split, w.other) for w in facts.wins] == [(s, o) for s in ("test", "dev") for o in ("encoder", "teacher")]
    against_encoder, dev = (w for w in facts.wins if w.split == "dev")
    assert against_encoder.gains == dev.gains and [e.query_id for e in against_encoder.won] == [
        e.query_id for e in dev.won
    ]
    assert len(dev.gains) == 6 and sum(dev.gains) == pytest.approx(
        sum(per_query["student"].values()) - sum(per_query["teacher"].values())
    )
    for example in dev.won + dev.lost:
        assert example.gain == pytest.approx(
            per_query["student"][example.query_id] - per_query["teacher"][example.query_id]
        )
        _, _, grade, before, after = example.labelled[0]
        assert grade == 1
        assert example.other == pytest.approx(1 / before if before and before <= 10 else 0)
        assert example.student == pytest.approx(1 / after if after and after <= 10 else 0)
        assert [rank for rank, *_ in example.tops["student"]] == [1, 2, 3]
    assert dev.won or dev.lost


def test_the_first_screen_says_what_a_user_would_have_instead(page: str) -> None:
    first = page[page.index("<header>") : page.index("</header>")]
    assert "The student is not better than the encoder as it is" in first
    for name in ("encoder as it is", "BM25", "teacher", "student"):
        assert f'<td class="l">{name}</td>' in first
    assert "a third is left out: &lt;script&gt;" in first


def test_an_unfinished_run_has_a_page_of_what_is_there(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text((run / "run.json").read_text())
    page = render_page(gather(open_finished(str(tmp_path))))
    assert "has not been evaluated" in page and 'id="environment"' in page and 'id="wins"' not in page
    assert parsed(page).open == []


def test_extremes_take_the_largest_of_both_directions() -> None:
    teacher, student = dict.fromkeys("abcde", 0.5), {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.6, "e": 0.4}
    assert extremes(teacher, student, 1) == (["a"], ["c"])
    assert extremes(teacher, student, 9) == (["a", "d"], ["c", "e"])


def test_passages_below_the_threshold_are_not_shown_as_labelled(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "data")
    grades = {"p1": 0, "p2": 1, "p3": 2, "p4": -1, "p5": 3, "p6": 2, "p7": 2}
    (folder / "qrels.dev.tsv").write_text("".join(f"q24\t0\t{p}\t{grade}\n" for p, grade in grades.items()))
    config = load_config(None, ["collection.format=msmarco", f"collection.path={folder}"])
    build_collection(config.collection, str(tmp_path / "run"))
    collection = Collection.open(str(tmp_path / "run"))
    values = {"teacher": {"q24": 0.0}, "student": {"q24": 1.0}}
    ranked = {name: {"q24": ["p4", "p2", "p5"]} for name in values}

    def shown(threshold: int) -> tuple[list[tuple[str, int, int | None]], list[bool]]:
        (found,) = examples(collection, "dev", ["q24"], values, ranked, relevance_threshold=threshold)
        assert [passage for _, passage, _, _ in found.tops["student"]] == ["p4", "p2", "p5"]
        return [(p, grade, rank) for p, _, grade, _, rank in found.labelled], [top[3] for top in found.tops["student"]]

    assert shown(1) == ([("p5", 3, 3), ("p3", 2, None), ("p6", 2, None)], [False, True, True])
    assert shown(3) == ([("p5", 3, 3)], [False, False, True])


def test_rankings_are_read_from_trec_runs(tmp_path: Path) -> None:
    """Ids are written with white space encoded; quotes and NA are ids like others."""
    (tmp_path / "s.run").write_text('q%201 Q0 "p 1 3.0 t\nq%201 Q0 NA 2 2.0 t\nq2 Q0 p1 1 9.0 t\nq3 Q0 p%202 1 9.0 t\n')
    found = read_ranked(str(tmp_path / "s.run"), {"q 1", "q3", "q9"})
    assert found == {"q 1": ['"p', "NA"], "q3": ["p%202"]}
    (tmp_path / "empty.run").touch()
    assert read_ranked(str(tmp_path / "empty.run"), {"q3"}) == read_ranked(str(tmp_path / "none.run"), {"q3"}) == {}


def test_the_threshold_is_that_of_the_measures(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "evaluation" / "measures.json"
    measures = json.loads(path.read_text())
    assert measures["settings"]["relevance_threshold"] == 1
    measures["settings"]["relevance_threshold"] = 2  # above every grade that there is
    path.write_text(json.dumps(measures))
    found = gather(open_finished(str(tmp_path / "run"))).wins
    assert any(w.won or w.lost for w in found) and not any(e.labelled for w in found for e in w.won + w.lost)


def test_plots_by_hand() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and ticks(-0.013, 0.021, 3) == [0.0, 0.02]
    assert ticks(3, 3) == [3]
    assert [number(v) for v in (0, 12345.6, 0.123456, 7, 3e-6)] == ["0", "12,346", "0.1235", "7", "0.000003"]
    assert thinned([(float(i), 2.0 * i) for i in range(1000)], 100)[0] == (4.5, 9.0)
    assert thinned([(0, float("nan")), (1, 2)]) == [(1.0, 2.0)]
    svg = lines([Series("<a>", [(0, 0), (10, 1)])], x="step", y="loss & more")
    points = re.search(r'points="([^"]+)"', svg)
    assert points and points[1] == "56.0,226.0 624.0,14.0"
    assert "<a>" not in svg and "loss &amp; more" in svg
    drawn = intervals([Interval("x", 0.5, 0.0, 1.0, [0.4])], caption="c", zero=True)
    assert drawn.count('class="seed"') == 1 and 'class="zero"' in drawn
    bars = histogram([0.0, 0.0, 1.0, -0.5], caption="c", x="m")
    assert bars.count("bar win") + bars.count("bar loss") + bars.count("bar same") == 21
    assert "2 queries from -0.048 to +0.048" in bars and "1 queries from +0.905 to +1.000" in bars
    for none in ([0.0, 0.0], [0.0, 1e-16]):  # no differences, but for rounding
        bars = histogram(none, caption="c", x="m")
        assert re.findall(r'class="tick"[^>]*>([^<]+)<', bars) == ["2", "-1", "0", "1"]
        assert "2 queries from -0.048 to +0.048" in bars
    assert number(-1e-12) == "0"
    assert lines([], x="", y="") == "" and histogram([], caption="", x="") == ""


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_opens_it_without_an_error_and_its_script_works(page: str, tmp_path: Path) -> None:
    """A probe appended to our script sorts, filters and reads a curve; what it found is in the dumped document."""
    probe = """
    addEventListener("load", () => {
      const seen = [];
      const table = document.querySelector("table.sortable");
      table.querySelectorAll("th")[2].click();
      const column = [...table.tBodies[0].rows].map((row) => Number(row.cells[2].textContent));
      seen.push(column.every((v, i) => !i || column[i - 1] >= v) ? "sorted" : "unsorted");
      const box = document.querySelector("[data-choose]");
      const group = [...document.querySelectorAll(`[data-group="${box.dataset.choose}"]`)];
      box.querySelector("input").value = "no such words";
      box.querySelector("input").dispatchEvent(new Event("input"));
      seen.push(group.every((item) => item.hidden) ? "filtered" : "unfiltered");
      const svg = document.querySelector("svg[data-lines]");
      const place = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent("pointermove", { clientX: place.left + place.width / 2, clientY: place.top }));
      seen.push(svg.parentNode.querySelector(".tip").hidden ? "silent" : "reads");
      seen.push(document.documentElement.scrollWidth <= innerWidth ? "fits" : "overflows");
      document.body.dataset.seen = seen.join(" ");
    });"""
    open_page = re.sub(r"script-src '[^']+'", "script-src 'unsafe-inline'", page)
    open_page = open_page.replace("</script>\n</body>", probe + "</script>\n</body>")
    assert open_page.count("dataset.seen") == 1
    for name, text in (("as-written", page), ("probed", open_page)):
        (tmp_path / f"{name}.html").write_text(text)
        command = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={tmp_path / name}", "--window-size=500,900"]
        command += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000", "--dump-dom"]
        done = subprocess.run([*command, f"file://{tmp_path / name}.html"], capture_output=True, text=True, timeout=120)
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert done.returncode == 0 and console == [], console
        if name == "as-written":
            assert "aria-pressed" in done.stdout, "the policy let our own script run"
        else:
            assert 'data-seen="sorted filtered reads fits"' in done.stdout


def test_a_search_is_shown_with_its_best_trial_and_a_slice_for_every_key(page: str) -> None:
    part = " ".join(page[page.index('<section id="search">') : page.index('<section id="curves">')].split())
    assert "trial 2: distill.temperature 1.5 (0.25)" in part and "25 % of the time" in part
    assert part.count("<figure") == 3 and "distill.temperature, importance 0.90" in part
    drawn = part[: part.index('<div class="slices">')]
    assert drawn.count("<polyline") == 3  # the failed one has no line
    assert drawn.rindex("trial 2: temperature 1.5") > drawn.rindex("trial 0: temperature 0.25")  # drawn last, on top
    assert "failed: &lt;script&gt;alert(1)&lt;/script&gt;" in part
