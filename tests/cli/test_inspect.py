"""`inspect` and `label --suggest`: what they say about a small run is computed again here, literally."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from markupsafe import escape

from ckd_ray.config.schema import LabelConfig
from ckd_ray.errors import UserError
from ckd_ray.evaluate.runs import write_trec_run
from ckd_ray.files import write_json_atomic
from ckd_ray.inspection.inspect import inspect_query, nearest_ids, render
from ckd_ray.inspection.labelled_run import LabelledRun
from ckd_ray.inspection.suggest import SuggestSettings, best, merge, suggestions_of_part, write_suggestions
from ckd_ray.inspection.summary import summarize_labels
from ckd_ray.labels.files import ExpansionReader
from ckd_ray.labels.stage import LabelJob, label_part
from ckd_ray.report.facts import gather
from ckd_ray.report.page import render_page
from ckd_ray.retrieve.rankings import read_ranking_matrix
from ckd_ray.runs.directory import labels_folder
from ckd_ray.runs.finished import open_finished
from ckd_ray.store import EmbeddingStore
from tests.labelled import ranked_run
from tests.support import write_collection

TEMPERATURE, BETA, SIZE = 0.5, 0.3, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str) -> Path:
    """Query q0 has two labels, q1 none of a positive grade, q2 one beyond its ranking."""
    storage = tmp_path_factory.mktemp("inspect")
    folder = write_collection(storage / "collection")
    lines = (folder / "qrels.train.tsv").read_text().splitlines()
    changed = ["q0\t0\tp0\t1", "q0\t0\tp1\t1", "q1\t0\tp1\t0", "q2\t0\tp59\t1", *lines[3:]]
    (folder / "qrels.train.tsv").write_text("\n".join(changed) + "\n")
    values = (f"distill.temperature={TEMPERATURE}", f"distill.beta={BETA}", "distill.zero_row_floor=true")
    config, _ = ranked_run(storage, tiny_backbone, str(folder), *values)
    made = storage / "tiny"
    settings = config.label.model_copy(update={"token_vote": "feedback"})
    job = LabelJob(
        run=str(made),
        split="train",
        checkpoint=str(made / "teacher"),
        passages=str(made / "embeddings" / "passages"),
        rankings=str(made / "rankings"),
        out=str(made / "labels"),
        settings=settings,
    )
    label_part(job, None, 0, 0, 24)
    write_json_atomic(str(made / "labels" / "_manifest.json"), {"queries_per_part": 256})
    return made


def literal(run: Path, query: int, passages: list[int], labelled: list[int], beta: float) -> np.ndarray:
    """The mean, over the labelled passages, of the softmax in which that one is raised and the others are left out."""
    rows = EmbeddingStore.open(str(run / "embeddings/queries.train")).gather(np.array([query])).embeddings_TD.float()
    store = EmbeddingStore.open(str(run / "embeddings/passages"))
    expansion, weights = ExpansionReader.open(str(run / "labels"), "train").select(np.array([query]), SIZE, beta)
    scores = []
    for p in store.gather(np.array(passages)).split():
        best = [max(0.0, max(float(2 * (a @ b) - b @ b) for b in p.float())) - float(a @ a) for a in rows]
        extra = [max(0.0, max(float(2 * (a @ b) - b @ b) for b in p.float())) - float(a @ a) for a in expansion[0]]
        scores.append(sum(best) + float(np.dot(weights[0].numpy(), extra)))
    scores = np.array(scores)
    turns = []
    for positive in labelled or [None]:
        kept = [i for i, p in enumerate(passages) if p == positive or p not in labelled]
        raised = scores.copy()
        if positive is not None:
            raised[passages.index(positive)] = scores[kept].max()
        e = np.zeros(len(passages))
        e[kept] = np.exp((raised[kept] - raised[kept].max()) / TEMPERATURE)
        turns.append(e / e.sum())
    return np.mean(turns, axis=0)


def dense(run: Path, ids: list[str]) -> list[int]:
    return [int(i[1:]) for i in ids]


@pytest.mark.parametrize(("query", "labelled"), [(0, [0, 1]), (1, []), (2, [59]), (5, [5])])
def test_probabilities_are_the_literal_ones(run: Path, query: int, labelled: list[int]) -> None:
    found = inspect_query(str(run), f"q{query}", top=6)
    passages = dense(run, [p["passage_id"] for p in found["passages"]])
    ranking = read_ranking_matrix(str(run / "rankings"), "train")[query].tolist()
    assert set(passages) == {*ranking[:6], *labelled} and dense(run, [p["passage_id"] for p in found["labelled"]]) == (
        labelled
    )
    column = {name: [p[name] for p in found["passages"]] for name in ("one_hot", "teacher", "collective", "rank")}
    assert column["one_hot"] == [1 / len(labelled) if p in labelled else 0 for p in passages]
    assert np.allclose(column["teacher"], literal(run, query, passages, labelled, 0.0), atol=1e-5)
    assert np.allclose(column["collective"], literal(run, query, passages, labelled, BETA), atol=1e-5)
    assert not np.allclose(column["teacher"], column["collective"], atol=1e-4)
    assert column["rank"] == [ranking.index(p) + 1 if p in ranking else None for p in passages]
    expansion = found["expansion"]
    assert [e["weight"] for e in expansion] == pytest.approx(
        [BETA * e["idf"] if i < SIZE else 0 for i, e in enumerate(expansion)]
    )
    assert dense(run, [p["passage_id"] for p in found["feedback"]]) == ranking[:3]
    shown = render(found)
    assert "softmax over these" in shown and f"temperature {TEMPERATURE:g}" in shown
    for part in (found["text"], *(e["token"] for e in expansion), *(p["passage_id"] for p in found["passages"])):
        assert part in shown


def test_what_cannot_be_inspected(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such query(.|\n)*nearest: q"):
        inspect_query(str(run), "q999")
    with pytest.raises(UserError, match="one of split dev"):
        inspect_query(str(run), "q24")
    with pytest.raises(UserError, match="no run here"):
        inspect_query(str(tmp_path), "q0")
    (tmp_path / "run.json").write_text('{"config": {"run": {"name": "half"}}}')
    with pytest.raises(UserError, match="ckd-ray label"):
        inspect_query(str(tmp_path), "q0")


def test_a_search_s_winner_has_labels_and_settings_of_its_own(run: Path, tmp_path: Path) -> None:
    """Its run.json says both; the labels lie beside the run's, under their settings."""
    made = tmp_path / "tiny"
    shutil.copytree(run, made)
    record = json.loads((made / "run.json").read_text())
    mine = json.loads(json.dumps(record)) | {"variant": "tune/best"}
    mine["config"]["distill"]["temperature"] = 3.0
    winner = made / "tune" / "best"
    winner.mkdir(parents=True)
    (winner / "run.json").write_text(json.dumps(mine))
    found, plain = inspect_query(str(winner), "q0", top=3), inspect_query(str(made), "q0", top=3)
    assert found["expansion"] == plain["expansion"] and found["run"] == str(winner)
    assert (found["settings"]["temperature"], plain["settings"]["temperature"]) == (3.0, TEMPERATURE)

    mine["config"]["label"]["feedback_passages"] = 1
    of_version_1 = {key: value for key, value in mine.items() if key != "schema"}  # it left the folder to be found
    for written in (of_version_1, mine | {"labels": labels_folder(mine["config"]["label"])}):
        (winner / "run.json").write_text(json.dumps(written))
        with pytest.raises(UserError, match=r"tune/labels-\w+: this run has no labels yet(.|\n)*ckd-ray tune"):
            inspect_query(str(winner), "q0")
    settings = LabelConfig.model_validate(mine["config"]["label"]).model_copy(update={"token_vote": "feedback"})
    labels = made / labels_folder(mine["config"]["label"])
    part = LabelJob(
        run=str(made),
        split="train",
        checkpoint=str(made / "teacher"),
        passages=str(made / "embeddings" / "passages"),
        rankings=str(made / "rankings"),
        out=str(labels),
        settings=settings,
    )
    label_part(part, None, 0, 0, 24)
    write_json_atomic(str(labels / "_manifest.json"), {"queries_per_part": 256, "made_of": "m", "seconds": 4321.0})
    assert len(inspect_query(str(winner), "q0")["feedback"]) == 1
    assert len(inspect_query(str(made), "q0")["feedback"]) == 3
    write_json_atomic(str(made / "embeddings" / "_manifest.json"), {"made_of": "m"})
    facts = gather(open_finished(str(winner)))
    assert facts.labels
    assert {(len(f["feedback"]), f["settings"]["temperature"]) for f in facts.labels["examples"]} == {(1, 3.0)}
    shown = render_page(facts)
    assert shown.count("likeliest other passages under collective labels") == len(facts.labels["examples"]) == 4
    for example in facts.labels["examples"]:
        for passage in example["passages"]:
            assert escape(passage["passage_id"]) in shown and f"{passage['collective']:.3f}" in shown
    assert [stage["seconds"] for stage in facts.stages if stage["name"] == "label"] == [4321.0]


def test_the_summary_of_labels_is_the_literal_one(run: Path) -> None:
    opened = LabelledRun.open(str(run))
    depth, ranking = opened.settings.negatives_depth, read_ranking_matrix(str(run / "rankings"), "train")
    found = summarize_labels(opened, 1000)
    assert found["queries"] == [f"q{i}" for i in range(24) if i != 1] and found["labelled_queries"] == 23
    for kind, beta in (("teacher", 0.0), ("collective", BETA)):
        rows, raising = [], []
        for query in [int(q[1:]) for q in found["queries"]]:
            labelled = {0: [0, 1], 2: [59]}.get(query, [query])
            passages = ranking[query, :depth].tolist()
            passages += [p for p in labelled if p not in passages]
            p = literal(run, query, passages, labelled, beta)
            others = [float(v) for v, passage in zip(p, passages, strict=True) if passage not in labelled]
            entropy = -sum(float(v) * np.log(v) for v in p if v > 0)
            relevant = sum(v >= found["threshold"] for v in others)
            raising += [f"q{query}"] * (relevant > 0)
            rows.append((entropy, entropy / np.log(len(p)), 1 - sum(others), relevant, relevant > 0))
        names = ("entropy", "entropy_share", "label_mass", "relevant", "share")
        assert [found["kinds"][kind][name] for name in names] == pytest.approx(np.mean(rows, axis=0), abs=1e-4)
        assert kind == "teacher" or found["raising"] == raising
    assert found["kinds"]["one_hot"]["label_mass"] == 1 and found["kinds"]["one_hot"]["relevant"] == 0
    assert len(summarize_labels(opened, 5)["queries"]) == 5


def test_nearest_ids_of_many() -> None:
    assert nearest_ids("MED-1000x", [f"MED-{i}" for i in range(50_000)])[0] == "MED-1000"


def test_the_command_prints_one_object_and_needs_no_ray(run: Path) -> None:
    code = (
        "import sys; sys.argv = ['ckd-ray', 'inspect', *sys.argv[1:], '--json', '--top', '3']\n"
        "from ckd_ray.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'ray' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run), "q0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == inspect_query(str(run), "q0", top=3)
    wrong = subprocess.run(
        [sys.executable, "-m", "ckd_ray", "inspect", str(run), "nobody"], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "no such query" in wrong.stderr and "Traceback" not in wrong.stderr
    assert wrong.stdout == ""


def test_suggestions_are_the_probable_unlabelled_passages(run: Path, tmp_path: Path) -> None:
    opened = LabelledRun.open(str(run))
    ranking = read_ranking_matrix(str(run / "rankings"), "train")
    expected = []
    for query in range(24):
        labelled = {0: [0, 1], 1: [], 2: [59]}.get(query, [query])
        if not labelled:
            continue
        passages = ranking[query, :15].tolist()
        passages += [p for p in labelled if p not in passages]
        for p, score in zip(passages, literal(run, query, passages, labelled, BETA), strict=True):
            if p not in labelled and score >= 0.05:
                expected.append((f"q{query}", f"p{p}", score))
    expected.sort(key=lambda row: -row[2])
    halves = [suggestions_of_part(opened, 0, 0, 24, SuggestSettings(top, 0.05)) for top in (1000, 7)]
    for found, wanted in zip(halves, (expected, expected[:7]), strict=True):
        assert sorted(zip(found["query_id"].to_pylist(), found["id"].to_pylist(), strict=True)) == sorted(
            row[:2] for row in wanted
        )
        assert np.allclose(found["score"], [row[2] for row in wanted], atol=1e-5)
    write_suggestions(str(tmp_path / "found"), halves[1])
    fields = [line.split(" ") for line in (tmp_path / "found").read_text().splitlines()]
    assert len(fields) == 7 and all(len(f) == 4 and f[1] == "0" for f in fields)
    assert [float(f[3]) for f in fields] == sorted((float(f[3]) for f in fields), reverse=True)


def test_suggestions_merge_to_the_same_in_any_order(run: Path) -> None:
    whole = suggestions_of_part(LabelledRun.open(str(run)), 0, 0, 24, SuggestSettings(1000, 0.0))
    rows = torch.randperm(whole.num_rows, generator=torch.Generator().manual_seed(1)).numpy()
    parts = [whole.take(rows[i : i + 5]) for i in range(0, len(rows), 5)]
    assert whole.num_rows > 60
    assert merge(parts, 10).equals(merge(parts[::-1], 10)) and merge(parts, 10).equals(best(whole, 10))


def test_white_space_in_suggested_ids_is_encoded_as_in_runs(tmp_path: Path) -> None:
    ids = {"query_id": ["q 1"], "id": ["p\u3000\u00a02"]}
    write_suggestions(str(tmp_path / "found"), pa.table({**ids, "score": [0.5]}))
    assert (tmp_path / "found").read_text() == "q%201 0 p%E3%80%80%C2%A02 0.500000\n"
    run = pd.DataFrame({"query_id": ids["query_id"], "doc_id": ids["id"], "rank": [1], "score": [0.5]})
    write_trec_run(str(tmp_path / "run"), [run], "tag")
    assert (tmp_path / "run").read_text() == "q%201 Q0 p%E3%80%80%C2%A02 1 0.500000 tag\n"


def test_suggest_settings_that_make_no_sense() -> None:
    for settings in (SuggestSettings(0), SuggestSettings(least=1.5)):
        with pytest.raises(UserError, match="--suggest-"):
            settings.check()
