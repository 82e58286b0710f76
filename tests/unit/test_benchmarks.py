"""The benchmarks' own arithmetic, by hand. None of them is run."""

from __future__ import annotations

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_ray.embed.stream import plan_shards
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.encoder import TextEncoder
from ckd_ray.store import shard_name
from tests.evidence import store_of
from tests.support import WORDS


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_the_tenths_are_of_passages_whatever_the_shards_hold() -> None:
    from embed_growth import tenths

    # 100 passages, ten a second; the clock starts with the first shard, and a tenth is a quarter of the second one.
    assert tenths([(6.0, 10), (4.0, 40), (5.0, 10), (0.0, 40)]) == pytest.approx((10, 10))
    assert tenths([(0.0, 40), (4.0, 40), (5.0, 10), (7.0, 10)]) == pytest.approx((10, 5))  # the last took two seconds
    sizes = [stop - first for first, stop in plan_shards(1_000_000, "auto")]
    steady = zip(np.cumsum(sizes) / 4000, sizes, strict=True)
    assert len(set(sizes)) > 10 and tenths(list(steady)) == pytest.approx((4000, 4000))


def test_the_shards_of_a_store_have_their_times_and_passages(tmp_path: Path, tiny_backbone: str) -> None:
    from embed_growth import committed

    model = ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48))
    store = store_of(model, [WORDS[i] for i in range(7)], tmp_path, shard=3)
    for i, time in enumerate((50, 30, 40)):
        os.utime(tmp_path / shard_name(i), (time, time))
    assert committed(store) == [(50.0, 3), (30.0, 3), (40.0, 1)]


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_part_has_the_last_line_of_a_file_with_or_without_its_end(tmp_path: Path, end: str) -> None:
    from part import cut

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "collection.tsv").write_text("p0\tzero\n\np1\tone\np2\ttwo" + end)
    (source / "queries.train.tsv").write_text("q0\tzero\nq1\ttwo" + end)
    (source / "qrels.train.tsv").write_text("q0\t0\tp0\t1\nq1\t0\tp2\t1" + end)
    (source / "queries.test.tsv").write_text("")
    (source / "qrels.test.tsv").write_text("")
    assert cut(source, out, {"train": None, "test": None}) == {"train": 2, "test": 0, "passages": 2}
    assert (out / "collection.tsv").read_text() == "p0\tzero\np2\ttwo\n"


def test_the_padded_loop_takes_the_precision_that_it_is_given(tiny_backbone: str) -> None:
    from embed_rates import padded_loop

    model = ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)).eval()
    texts = [" ".join(WORDS[: 1 + i % 20]) for i in range(40)]
    rows_TD = TextEncoder(model).passages(model.tokenizer.passages(texts)).embeddings_TD.float()
    loops = {p: torch.cat(padded_loop(model, texts, torch.device("cpu"), p)).float() for p in ("fp32", "bf16")}
    assert torch.allclose(loops["fp32"], rows_TD, atol=2e-3)
    assert 0 < float((loops["bf16"] - loops["fp32"]).abs().max()) < 0.1


def test_peers_train_on_labelled_passages_and_negatives_of_the_ranking_within_the_budget() -> None:
    from peers import Budget, draw

    budget = Budget(steps=3, queries_per_step=2, negatives=2)
    assert budget.to_dict() == {"steps": 3, "queries_per_step": 2, "negatives": 2, "passages_encoded": 18}
    # Query 1 has no label; query 3 has one passage in its ranking that is not labelled, and is filled up from all ten.
    rankings = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 5, -1, -1]])
    labelled = {0: [1], 2: [8, 9], 3: [2]}
    rows = draw(rankings, labelled, budget, 10, seed=1)
    assert rows == draw(rankings, labelled, budget, 10, seed=1) != draw(rankings, labelled, budget, 10, seed=2)
    assert sorted(query for query, _ in rows) == [0, 0, 2, 2, 3, 3]
    assert sorted(query for query, _ in rows[:3]) == [0, 2, 3]
    for query, (positive, *negatives) in rows:
        assert positive in labelled[query] and not set(negatives) & set(labelled[query])
        assert len(set(negatives)) == 2
        assert set(negatives) <= ({0, 2, 3} if query == 0 else {0, 1} if query == 2 else set(range(10)))
    assert all(len(passages) == 1 for _, passages in draw(rankings, labelled, Budget(1, 3, 0), 10, seed=1))


def test_rows_of_peers_have_the_columns_of_the_library_and_the_recipe() -> None:
    from peers_train import columns

    rows = [{"query": "q", "passages": ["p", "n", "m"], "scores": [30.0, 20.0, 10.0]}]
    contrastive = {"query": ["q"], "positive": ["p"], "negative_1": ["n"], "negative_2": ["m"]}
    for library in ("pylate", "sentence-transformers"):
        job = {"library": library, "recipe": "contrastive", "teacher_scores": "raw"}
        assert columns(job, rows) == contrastive and next(iter(columns(job, rows))) == "query"
    job = {"library": "pylate", "recipe": "kl", "teacher_scores": "minmax"}
    assert columns(job, rows) == {"query": ["q"], "documents": [["p", "n", "m"]], "scores": [[1.0, 0.5, 0.0]]}
    job = {"library": "sentence-transformers", "recipe": "kl", "teacher_scores": "raw"}
    documents = {"document_0": ["p"], "document_1": ["n"], "document_2": ["m"]}
    assert columns(job, rows) == {"query": ["q"], **documents, "scores": [[30.0, 20.0, 10.0]]}


def test_the_paired_difference_to_peers_is_over_the_queries_of_all_seeds() -> None:
    from peers import differences

    own = {"dev": {"MRR@10": {"b": 1.0, "a": 0.5}, "R@100": {"a": 1.0, "b": 1.0}}}
    found = [{"dev": {"MRR@10": {"a": 0.25, "b": 0.5}}}, {"dev": {"MRR@10": {"a": 0.25, "b": 1.0}}}]
    rows = differences(own, found)
    assert list(rows) == ["dev"] and list(rows["dev"]) == ["MRR@10"]
    assert rows["dev"]["MRR@10"]["mean"] == 0.25  # b: 0.5 and 0, a: 0.25 and 0.25
    assert set(rows["dev"]["MRR@10"]) == {"mean", "p", "low", "high"}
    assert differences({}, found) == {}


@pytest.mark.parametrize("gone", [False, True])
def test_a_request_that_is_not_answered_is_counted_and_its_client_goes_on(
    gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that breaks off every third connection and refuses every fifth request; and none at all."""
    import serve

    asked = list[int]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(len(asked))
            if len(asked) % 3 == 0:
                self.close_connection = True  # without a word
                return
            self.send_response(503 if len(asked) % 5 == 0 else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(serve, "PAUSE_S", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        options = serve.ServeOptions(port=server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        if gone:
            server.shutdown()
            server.server_close()
        times, failed = serve.under_load(options, ["a", "b"], 1, 0.5)
        server.shutdown()
    if gone:
        assert times == [] and failed > 2 and asked == []
        return
    bad = sum(1 for i in range(1, len(asked) + 1) if i % 3 == 0 or i % 5 == 0)
    # The first request of a client has no time of its own.
    assert len(asked) > 15 and failed == bad and len(times) == len(asked) - bad - 1
