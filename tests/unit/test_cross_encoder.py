"""Scores of another teacher: on disk, from files good and bad, from classifiers, and in a batch of training."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from ckd_ray.checks import load_config
from ckd_ray.collective.losses import BatchScores, kl
from ckd_ray.config import ConfigError
from ckd_ray.cross_encoder import score_file
from ckd_ray.cross_encoder.candidates import CandidateReader
from ckd_ray.cross_encoder.classifier import PairClassifier, PairTokenizer, absolute_folder
from ckd_ray.cross_encoder.score_file import Coverage, PassageIndex, import_scores
from ckd_ray.cross_encoder.scores import CrossScores, keep_scored, write_scores
from ckd_ray.cross_encoder.stream import queries_a_part
from ckd_ray.data import Collection, build_collection
from ckd_ray.data.problems import InputError
from ckd_ray.errors import UserError
from ckd_ray.files import write_json_atomic
from ckd_ray.model.encoder import Precision
from ckd_ray.pipeline.graph import needed, stage_fingerprint
from ckd_ray.ray_util.parts import part_file
from ckd_ray.retrieve.rankings import write_ranking_part
from tests.labelled import with_rankings
from tests.support import WORDS, classifier, overrides

DEPTH = 5


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> str:
    """See `with_rankings`."""
    return with_rankings(tmp_path_factory.mktemp("ranked"), tiny_backbone, tiny_collection)


def imported(ranked: str, path: Path, out: Path) -> Coverage:
    size, coverage = import_scores(str(path), str(out), CandidateReader(ranked, 1, DEPTH), ranked)
    write_json_atomic(str(out / "_manifest.json"), {"queries_per_part": size})
    return coverage


def as_parquet(path: Path, rows: list[tuple[str, str, float]]) -> Path:
    queries, passages, scores = zip(*rows, strict=True)
    path = path.with_suffix(".parquet")
    # Ids as whole numbers are strings outside all the same, and a wider float is fine.
    pq.write_table(pa.table({"score": scores, "query_id": queries, "passage_id": passages}), path)
    return path


def as_tsv(path: Path, rows: list[tuple[str, str, float]]) -> Path:
    path = path.with_suffix(".tsv")
    path.write_text("".join(f"{q}\t{p}\t{s}\n" for q, p, s in rows))
    return path


def as_json_lines(path: Path, rows: list[tuple[str, str, float]]) -> Path:
    """A query in several lines, with repetitions, as triples with scores have it."""
    path = path.with_suffix(".jsonl.gz")
    lines = [json.dumps([q, [p, s], [p, s]]) for q, p, s in rows] + ["", json.dumps([rows[0][0], list(rows[0][1:])])]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def by_query(rows: list[tuple[str, str, float]]) -> dict[str, list]:
    """The columns of lists of sentence-transformers and PyLate."""
    queries = list(dict.fromkeys(q for q, _, _ in rows))
    passages = [[p for q, p, _ in rows if q == query] for query in queries]
    return {"query_id": queries, "document_ids": passages,
            "scores": [[s for q, _, s in rows if q == query] for query in queries]}  # fmt: skip


def as_lists(path: Path, rows: list[tuple[str, str, float]]) -> Path:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.table(by_query(rows)), path)
    return path


def as_lists_in_text(path: Path, rows: list[tuple[str, str, float]]) -> Path:
    """As published sets have them: Python's spelling, with single quotation marks."""
    path = path.with_suffix(".parquet")
    columns = by_query(rows)
    columns |= {name: [str(value) for value in columns[name]] for name in ("document_ids", "scores")}
    pq.write_table(pa.table(columns), path)
    return path


def as_objects(path: Path, rows: list[tuple[str, str, float]]) -> Path:
    path = path.with_suffix(".jsonl")
    columns = by_query(rows)
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def as_tevatron(path: Path, rows: list[tuple[str, str, float]]) -> Path:
    path = path.with_suffix(".jsonl")
    lines = []
    for query, passages, scores in zip(*by_query(rows).values(), strict=True):
        listed = [{"docid": p, "text": "", "score": s} for p, s in zip(passages, scores, strict=True)]
        row = {"query_id": query, "positive_passages": listed[:1], "negative_passages": listed[1:]}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


def texts_of(run: str, rows: list[tuple[str, str, float]]) -> list[tuple[str, str, float]]:
    """The rows with texts in the place of ids; ids of the tests are their indices."""
    collection = Collection.open(run)
    queries, passages = collection.queries("train").texts, collection.iter_passages(0, collection.num_passages)
    return [(queries[int(q[1:])], passages[int(p[1:])], score) for q, p, score in rows]


def as_flagembedding(path: Path, rows: list[tuple[str, str, float]]) -> Path:
    path = path.with_suffix(".jsonl")
    lines = []
    for query, passages, scores in zip(*by_query(rows).values(), strict=True):
        lists = {"pos": passages[:1], "neg": passages[1:], "pos_scores": scores[:1], "neg_scores": scores[1:]}
        lines.append(json.dumps({"query": query, **lists}) + "\n")
    path.write_text("".join(lines))
    return path


ROWS = [("q3", "p3", 2.5), ("q3", "p5", -1.25), ("q0", "p2", 0.5), ("q3", "p40", 9.0), ("q23", "p24", 1e-3)]


@pytest.mark.parametrize(
    "write", [as_parquet, as_tsv, as_json_lines, as_lists, as_lists_in_text, as_objects, as_tevatron]
)
@pytest.mark.parametrize("spills", [1, 256])
def test_a_file_in_every_form_reads_alike(
    ranked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path], spills: int
) -> None:
    monkeypatch.setattr(score_file, "_MOST_SPILLS", spills)
    monkeypatch.setattr(score_file, "query_spans", lambda n: [(i, min(i + 7, n)) for i in range(0, n, 7)])
    coverage = imported(ranked, write(tmp_path / "scores", ROWS), tmp_path / "out")
    # 24 labelled passages, 24 x 5 negatives; of them p3 of q3, and p5 of q3, p2 of q0, p24 of q23.
    assert (coverage.pairs, coverage.queries) == (5, 3)
    assert (coverage.labelled, coverage.negatives) == ([1, 24], [3, 120])
    scores = CrossScores.open(str(tmp_path / "out"))
    table, mask = scores.scores_and_mask(np.array([3, 7, 23]), np.array([40, 24, 3, 3, 5]))
    assert table.tolist() == [[9.0, 0, 2.5, 2.5, -1.25], [0.0] * 5, [0, pytest.approx(1e-3), 0, 0, 0]]
    assert mask.tolist() == [[True, False, True, True, True], [False] * 5, [False, True, False, False, False]]
    written = pa.concat_tables(pq.read_table(p) for p in sorted((tmp_path / "out").glob("*.parquet")))
    assert written.column_names == ["query_id", "passage_id", "score"]
    found = {(row["query_id"], row["passage_id"], round(row["score"], 6)) for row in written.to_pylist()}
    assert found == set(ROWS)
    assert not list(tmp_path.glob("ckd-ray-scores-*"))


def test_texts_stand_for_ids(ranked: str, tmp_path: Path) -> None:
    imported(ranked, as_flagembedding(tmp_path / "scores", texts_of(ranked, ROWS)), tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / part_file("train", 0)).to_pylist()
    assert {(row["query_id"], row["passage_id"], round(row["score"], 6)) for row in rows} == set(ROWS)


def test_margins_become_scores_by_what_their_triples_share(ranked: str, tmp_path: Path) -> None:
    """By hand: p3 has 0; p4 and p5 are 2 and 3.5 below it; p6 is 1 above p5; p7 is 4 below p6. q5 stands alone."""
    triples = [("q3", "p3", "p4", 2.0), ("q3", "p3", "p5", 3.5), ("q3", "p6", "p5", 1.0), ("q3", "p6", "p4", 1.0)]
    triples += [("q3", "p6", "p7", 4.0), ("q5", "p5", "p6", -0.5)]
    path = tmp_path / "scores.jsonl"
    lines = []
    for query, positive, negative, margin in triples:
        (text, first, _), (_, second, _) = texts_of(ranked, [(query, positive, 0), (query, negative, 0)])
        lines.append(json.dumps({"query": text, "positive": first, "negative": second, "margin": margin}) + "\n")
    path.write_text("".join(lines))
    imported(ranked, path, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / part_file("train", 0)).to_pylist()
    found = {(row["query_id"], row["passage_id"]): row["score"] for row in rows}
    of_q3 = {"p3": 0.0, "p4": -2.0, "p5": -3.5, "p6": -2.5, "p7": -6.5}
    assert found == {("q3", p): s for p, s in of_q3.items()} | {("q5", "p5"): 0.0, ("q5", "p6"): 0.5}


def test_every_query_of_a_text_gets_its_scores(tmp_path: Path, tiny_backbone: str) -> None:
    source = tmp_path / "c"
    source.mkdir()
    (source / "collection.tsv").write_text("a\tone\nb\ttwo\nc\ttwo\n")
    (source / "queries.train.tsv").write_text("x\tsame\ny\tother\nz\tsame\n")
    (source / "qrels.train.tsv").write_text("x\t0\ta\t1\ny\t0\ta\t1\nz\t0\ta\t1\n")
    run = tmp_path / "run"
    build_collection(load_config(None, overrides(run, tiny_backbone, str(source))).collection, str(run))
    write_ranking_part(
        str(run / "rankings" / part_file("train", 0)), first_query=0, query_ids=["x", "y", "z"],
        scores_BK=np.zeros((3, 2), np.float32), passages_BK=np.array([[1, 2]] * 3), passage_ids=["b", "c"] * 3,
    )  # fmt: skip
    scores = tmp_path / "scores.jsonl"
    scores.write_text('{"query": "same", "pos": ["one"], "neg": ["two"], "pos_scores": [2], "neg_scores": [1]}\n')
    import_scores(str(scores), str(tmp_path / "out"), CandidateReader(str(run), 1, 2), str(run))
    rows = pq.read_table(tmp_path / "out" / part_file("train", 0)).to_pylist()
    assert [(row["query_id"], row["passage_id"], row["score"]) for row in rows] == [
        ("x", "a", 2.0), ("x", "b", 1.0), ("z", "a", 2.0), ("z", "b", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ({"query": "?", "pos": ["no such text"], "neg": [], "pos_scores": [1], "neg_scores": []}, "unknown query"),
        ({"query": "?", "pos": ["a", "b"], "neg": [], "pos_scores": [1], "neg_scores": []}, "not a row of scores"),
        ({"query": "?", "positive": "a", "negative": 3, "margin": 1}, "not a row of scores"),
        ({"query": "?", "positive": "a", "negative": "b", "margin": "1"}, "not a row of scores"),
    ],
)
def test_texts_that_do_not_fit_are_named(ranked: str, tmp_path: Path, line: dict[str, object], wanted: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=rf"(?s)scores\.jsonl:1: .*{wanted}"):
        imported(ranked, path, tmp_path / "out")


def test_triples_that_share_nothing_are_named(ranked: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    pairs = [("a", "b"), ("c", "d")]
    path.write_text(
        "".join(json.dumps({"query": "?", "positive": p, "negative": n, "margin": 1}) + "\n" for p, n in pairs)
    )
    with pytest.raises(UserError, match=r"scores\.jsonl:2: a triple apart from the others of its query"):
        imported(ranked, path, tmp_path / "out")


def test_everything_wrong_with_a_file_is_named_with_its_line(ranked: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.tsv"
    path.write_text("q1\tp1\t1\nq99\tp1\t1\nq1\tp99\t1\nq1\tp2\tnan\nq1\tp3\thigh\nq1\tp4\nq2\tp3\t1e39\n")
    with pytest.raises(InputError) as caught:
        imported(ranked, path, tmp_path / "out")
    assert "problems in the scores" in str(caught.value)
    said = [line.partition(": ") for line in caught.value.problems]
    assert sorted(int(where.rpartition(":")[2]) for where, _, _ in said) == [2, 3, 4, 5, 6, 7]
    for word in ("unknown query", "'q99'", "unknown passage", "'p99'", "not finite", "nan", "no number", "not a row"):
        assert word in str(caught.value)
    path.write_text("q1\tp1\t1\nq1\tp2\t2.5\nq1\tp1\t1\nq1\tp2\t3.5\n")
    with pytest.raises(
        InputError, match=r"scores.tsv:4: a second score of query 'q1' and passage 'p2'.*2.5 as at line 2"
    ):
        imported(ranked, path, tmp_path / "out")
    path.write_text("q1\tp30\t1\n")
    with pytest.raises(UserError, match="of no use"):
        imported(ranked, path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("scores.csv", "q1,p1,1\n", r"\.parquet, \.tsv"),
        ("scores.tsv", None, "does not exist"),
        ("scores.parquet", None, "does not exist"),
        ("scores.parquet", "q1\tp1\t1\n", "not a Parquet file"),
        ("scores.jsonl", '["q1", ["p1"]]\n', "scores.jsonl:1"),
        ("scores.jsonl", '["q1", ["p1", true]]\n', "scores.jsonl:1"),
        ("scores.jsonl", '{"q1": 1}\n', "scores.jsonl:1"),
        ("scores.jsonl", '{"query_id": "q1", "positive_passages": [{"docid": "p1"}]}\n', "scores.jsonl:1"),
    ],
)
def test_files_that_are_no_scores(ranked: str, tmp_path: Path, name: str, content: str | None, wanted: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=wanted):
        imported(ranked, tmp_path / name, tmp_path / "out")


def test_parquet_with_other_columns_and_with_nulls(ranked: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table({"query": ["q1"], "passage_id": ["p1"], "score": [1.0]}), path)
    with pytest.raises(UserError, match=r"(?s)no columns of scores.*found: query, passage_id, score"):
        imported(ranked, path, tmp_path / "out")
    pq.write_table(pa.table({"query_id": ["q1", None], "passage_id": ["p1", "p2"], "score": [None, 1.0]}), path)
    with pytest.raises(
        InputError, match=r"(?s)scores.parquet:2: an empty id.*scores.parquet:1: a score that is not fin"
    ):
        imported(ranked, path, tmp_path / "out")


def test_lists_that_do_not_fit_are_named_with_examples(ranked: str, tmp_path: Path) -> None:
    """Lengths, ids that are not of this collection, and what is no list; the sound rows around them are read."""
    path = tmp_path / "scores.parquet"
    rows = [("q1", "['p1', 'p2']", "[1.0, 0.5]"), ("q2", "['p2']", "[1.0, 0.5]"), ("q3", "[7, 8]", "[1.0, 0.5]"),
            ("q4", "p4", "[1.0]"), ("q5", "['p5']", "[none]"), ("none", "['p6']", "[1.0]"), ("q6", None, "[1.0]"),
            ("q7", "['p7']", "[" * 100_000)]  # fmt: skip
    columns = zip(("query_id", "document_ids", "scores"), zip(*rows, strict=True), strict=True)
    pq.write_table(pa.table({name: list(values) for name, values in columns}), path)
    with pytest.raises(InputError) as caught:
        imported(ranked, path, tmp_path / "out")
    said = "\n".join(caught.value.problems)
    assert (
        f"{path}:2: lists of different lengths; expected a score for every passage, found 1 and 2, of query 'q2'"
        in said
    )
    for row in (4, 5, 7, 8):
        assert f"{path}:{row}: not a row of scores; expected an id, a list of ids and a list of numbers" in said
    assert f"{path}:3: a score of an unknown passage; expected an id of the corpus, found '7'" in said
    assert f"{path}:6: a score of an unknown query; expected an id of the training queries, found 'none'" in said
    assert f"{path}:1:" not in said and len(caught.value.problems) == 8


def test_passages_that_share_a_hash_are_told_apart(ranked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_file, "_hashes", lambda ids: np.array([len(i) for i in ids], np.uint64))
    index = PassageIndex.of_ids(Collection.open(ranked))
    assert index.find(["p7", "p12", "p99", "p", "p59", "x1"]).tolist() == [7, 12, -1, -1, 59, -1]


def literal_row(student: list[float], teacher: dict[int, float], positive: int, temperature: float) -> float:
    """KL over the scored columns of a row, in Python floats; the positive has the highest score."""
    teacher = teacher | {positive: max([*teacher.values(), -math.inf])} if teacher else {positive: 0.0}
    top = max(teacher.values())
    powers = {n: math.exp((s - top) / temperature) for n, s in teacher.items()}
    target = {n: power / sum(powers.values()) for n, power in powers.items()}
    log_sum = math.log(sum(math.exp(student[n]) for n in teacher))
    return sum(t * (math.log(t) - student[n] + log_sum) for n, t in target.items() if t > 0)


def test_pairs_without_a_score_leave_both_sides_of_the_row(tmp_path: Path) -> None:
    known = [{0: 2.0, 1: 1.9, 4: 2.2}, {3: 0.5}, {}, {6: -1.0, 7: -3.0, 1: -1.2}]
    write_scores(
        str(tmp_path),
        "train",
        0,
        query_ids=["a", "b", "c", "d"],
        passages=[np.array(list(row), np.int64) for row in known],
        scores=[np.array(list(row.values()), np.float32) for row in known],
        passage_ids=[str(p) for row in known for p in row],
    )
    positives = torch.tensor([0, 2, 4, 6])  # b's and c's positives have no score
    valid = torch.ones(4, 8, dtype=torch.bool)
    valid[0, 1] = valid[3, 1] = False  # 1 is another labelled passage of a and of d
    reader = CrossScores(str(tmp_path), "train", 4)
    scores, kept = reader.of_batch(np.arange(4), np.arange(8), positives, valid)
    student: Tensor = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    student.requires_grad_()
    batch = BatchScores(student, positives, valid, 2, scores, kept)
    loss = kl(batch, scale=1.0, temperature=0.25).loss_B
    rows = student.detach().tolist()
    scored = [{0: 2.0, 4: 2.2}, {3: 0.5}, {}, {6: -1.0, 7: -3.0}]
    wanted = [literal_row(rows[b], scored[b], int(positives[b]), 0.25) for b in range(4)]
    assert loss.tolist() == pytest.approx(wanted, abs=1e-6)
    assert wanted[1] > 0 and wanted[2] == 0
    loss.sum().backward()
    assert student.grad is not None
    touched = [[0, 4], [2, 3], [], [6, 7]]
    assert [torch.nonzero(row).flatten().tolist() for row in student.grad] == touched


def test_keep_scored_never_reads_what_is_not_valid() -> None:
    """A score that the labels rule out (another positive) does not lift the unscored positive."""
    scores, scored = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[False, True, True]])
    out, valid = keep_scored(scores, scored, torch.tensor([0]), torch.tensor([[True, False, True]]))
    assert out[0, 0] == 1.0 and valid.tolist() == [[True, False, True]]


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_those_of_the_model_pair_by_pair(tmp_path: Path, tiny_backbone: str, labels: int, side: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = classifier(tmp_path, tiny_backbone, labels, padding_side=side)
    queries = ["ban bel", "bim", "bor buk bost can", "ban " * 30]
    passages = ["cel cim cor " * 9, "ban.", "", "bel, bim " * 20]
    pairs = PairTokenizer(source, 24)(queries, passages)
    found = PairClassifier(source, token_budget=50).score(pairs)
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    for i, (query, passage) in enumerate(zip(queries, passages, strict=True)):
        inputs = tokenizer(query, passage, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0].double()
        wanted = logits[0] if labels == 1 else torch.log(logits.softmax(0)[1] / logits.softmax(0)[0])
        if side == "left" and len(pairs.lengths) > 1:  # BERT counts positions from the left: only a lone row agrees
            lone = PairTokenizer(source, 24)([query], [passage])
            assert PairClassifier(source).score(lone)[0] == pytest.approx(float(wanted), abs=1e-5)
        else:
            assert found[i] == pytest.approx(float(wanted), abs=1e-5)
    assert pairs.lengths.max() == 24 and len(set(np.round(found, 4))) == 4


def test_models_that_are_no_cross_encoder(tmp_path: Path, tiny_backbone: str) -> None:
    with pytest.raises(UserError, match=r"not a trained classifier[\s\S]*classifier.weight"):
        PairClassifier(tiny_backbone)
    with pytest.raises(UserError, match=r"gives no score[\s\S]*3 labels"):
        PairClassifier(classifier(tmp_path / "three", tiny_backbone, 3))
    for source in (str(tmp_path / "nothing"), "package:no_such_package/model"):
        with pytest.raises(UserError, match=r"cross_encoder\.model"):
            PairClassifier(source)
    with pytest.raises(UserError, match=r"cross_encoder\.maxlen[\s\S]*at most 64"):
        PairTokenizer(tiny_backbone, 65)


def roberta(folder: Path, tiny_backbone: str) -> str:
    """A RoBERTa with one label, whose table of positions has 66 rows, in `folder`."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(3)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=200, max_position_embeddings=66, num_labels=1, **shape)
    )
    torch.nn.init.normal_(model.classifier.out_proj.weight, std=2.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(folder)
    return str(folder)


def test_positions_that_begin_after_the_padding_leave_less_room(tiny_backbone: str, tmp_path: Path) -> None:
    """RoBERTa's 66 positions hold 64 tokens: a longer pair would fail in the middle of the job."""
    source = roberta(tmp_path / "model", tiny_backbone)
    long = [" ".join(WORDS * 3)]
    pairs = PairTokenizer(source, 64)(long, long)
    assert pairs.lengths.tolist() == [64] and np.isfinite(PairClassifier(source).score(pairs)).all()
    with pytest.raises(UserError, match=r"cross_encoder\.maxlen[\s\S]*at most 64"):
        PairTokenizer(source, 65)


def test_candidates_are_what_training_draws(ranked: str) -> None:
    candidates = CandidateReader(ranked, 1, DEPTH).read(20, 24)
    assert [c.tolist() for c in candidates.all()] == [[i, *range(i + 1, i + 1 + DEPTH)] for i in range(20, 24)]
    # Above every grade no query has a label: nothing is trained on them, and a classifier does not score them.
    assert [c.tolist() for c in CandidateReader(ranked, 9, DEPTH).read(20, 24).all()] == [[]] * 4
    unlabelled = CandidateReader(ranked, 9, DEPTH, unlabelled=True).read(20, 24)
    assert [c.tolist() for c in unlabelled.all()] == [list(range(i, i + DEPTH)) for i in range(20, 24)]


def test_parts_are_small_and_grow_with_the_queries() -> None:
    assert [queries_a_part(n) for n in (1, 2048, 2049, 14_407, 808_731)] == [8, 8, 16, 64, 256]


def graph(*values: str) -> tuple[list[str], dict[str, str]]:
    config = load_config(None, list(values))
    done: dict[str, str] = {}
    for stage in needed(config, "distill"):
        done[stage.name] = stage_fingerprint(stage, config, done, "source")
    return list(done), done


def test_the_stage_is_there_for_its_objective_alone_and_follows_its_source(tmp_path: Path) -> None:
    assert "cross_encoder" not in graph("distill.objective=collective", "cross_encoder.model=m")[0]
    chosen = ("distill.objective=cross_encoder", "cross_encoder.model=m")
    names, before = graph(*chosen)
    assert names == ["collection", "teacher", "embed", "retrieve", "cross_encoder", "distill"]
    for value in ("maxlen=128", "depth=100", "precision=bf16", "model=n"):
        changed = graph(*chosen, f"cross_encoder.{value}")[1]["cross_encoder"] != before["cross_encoder"]
        assert changed == (value != "depth=100"), value  # 100 is what auto stands for
    for value in ("token_budget=99", "actors=1"):
        assert graph(*chosen, f"cross_encoder.{value}")[1] == before
    path = tmp_path / "scores.tsv"
    chosen = ("distill.objective=cross_encoder", f"cross_encoder.scores={path}")
    with pytest.raises(UserError, match="does not exist"):
        graph(*chosen)
    path.write_text("a\tb\t1\n")
    before = graph(*chosen)[1]
    path.write_text("a\tb\t1.5\n")
    assert graph(*chosen)[1]["cross_encoder"] != before["cross_encoder"]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        (["distill.objective=cross_encoder"], "cross_encoder.scores"),
        (["cross_encoder.scores=a.tsv", "cross_encoder.model=m"], "cross_encoder.model"),
        (["cross_encoder.depth=20"], "cross_encoder.depth"),
        (["cross_encoder.depth=200"], "cross_encoder.depth"),
    ],
)
def test_impossible_settings(values: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, values)
    assert [problem.path for problem in caught.value.problems] == [key]


def test_a_relative_folder_of_a_classifier_is_the_same_in_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert absolute_folder("models/mine") == str(tmp_path / "models" / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_folder("~/models/mine") == str(tmp_path / "models" / "mine")
    for source in ("cross-encoder/ms-marco-MiniLM-L6-v2", "package:numpy/models"):
        assert absolute_folder(source) == source


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_logits_are_not_rounded_to_16_bits(kind: str, precision: Precision, tiny_backbone: str, tmp_path: Path) -> None:
    """At 8 to 16 bfloat16 has steps of 1/16, so that a third of the scores of a hundred pairs tied."""
    folder = tmp_path / "model"
    source = classifier(folder, tiny_backbone, 1) if kind == "bert" else roberta(folder, tiny_backbone)
    words = WORDS[:50]
    pairs = PairTokenizer(source, 32)(words, words[::-1])
    exact = PairClassifier(source).score(pairs)
    halved = PairClassifier(source, precision=precision)
    found = halved.score(pairs)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    rounded = torch.from_numpy(found).to(dtype).float().numpy()
    assert (rounded != found).mean() > 0.8 and len(set(found.tolist())) > 0.9 * len(set(exact.tolist()))
    assert 0 < np.abs(found - exact).max() < 0.1 * exact.std()
