"""The cross_encoder stage on real Ray: the model's own scores, whoever dies, and no part made twice."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ckd_ray.checks import load_config
from ckd_ray.config import CrossEncoderConfig
from ckd_ray.config.schema import DistillConfig
from ckd_ray.cross_encoder import stream
from ckd_ray.cross_encoder.stream import CrossEncoderJob, score_candidates
from ckd_ray.data import build_collection
from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.step import TrainingStep
from ckd_ray.distill.task import TrainingTask
from ckd_ray.files import write_json_atomic
from ckd_ray.model import ColBERT, ColBERTSettings, maxsim
from ckd_ray.ray_util.parts import part_file
from ckd_ray.retrieve.rankings import write_ranking_matrix, write_ranking_part
from tests.fault.processes import below
from tests.support import classifier, overrides

QUERIES, DEPTH = 24, 5


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> CrossEncoderJob:
    """Query i has passage i for its label and ranks i + 9, i + 8, ... i."""
    run = tmp_path_factory.mktemp("crossed")
    build_collection(load_config(None, overrides(run, tiny_backbone, tiny_collection)).collection, str(run))
    passages = np.arange(QUERIES)[:, None] + np.arange(9, -1, -1)[None]
    write_ranking_part(
        str(run / "rankings" / part_file("train", 0)),
        first_query=0,
        query_ids=[f"q{i}" for i in range(QUERIES)],
        scores_BK=-np.tile(np.arange(10, dtype=np.float32), (QUERIES, 1)),
        passages_BK=passages.astype(np.int64),
        passage_ids=[f"p{i}" for i in passages.reshape(-1)],
    )
    write_ranking_matrix(str(run / "rankings"), "train", [(0, QUERIES)], 10)
    model = classifier(tmp_path_factory.mktemp("classifier"), tiny_backbone, 2)
    return CrossEncoderJob(str(run), str(run / "cross_scores"), model, 1, DEPTH, 48, 400, "fp32")


def kill_one_scorer(job: CrossEncoderJob, killed: list[int]) -> None:
    """As soon as a part is there, the actor that wrote it dies."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if not any(Path(job.out).glob("_rows/*.npy")):
            continue  # looking through all processes is dear, and would slow down what is waited for
        for process in below(os.getpid()):  # this session's Ray only
            if "PartScorer" in process.title:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                return


def test_the_stage_has_the_model_s_scores_though_an_actor_dies(
    ray_session: None, job: CrossEncoderJob, tiny_collection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    monkeypatch.setattr(
        stream, "queries_a_part", lambda queries: 2
    )  # twelve parts, so that work is left after the kill
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_scorer, args=(job, killed))
    killer.start()
    size, pairs = score_candidates(job, CrossEncoderConfig(actors=1), QUERIES)
    killer.join()
    assert killed and size == 2 and pairs == QUERIES * (1 + DEPTH)
    write_json_atomic(os.path.join(job.out, "_manifest.json"), {"queries_per_part": size})
    rows = pa.concat_tables(pq.read_table(p) for p in sorted(Path(job.out).glob("*.parquet"))).to_pylist()
    wanted = {(f"q{i}", f"p{i + j}") for i in range(QUERIES) for j in (0, *range(9, 9 - DEPTH, -1))}
    assert len(rows) == len(wanted) and {(r["query_id"], r["passage_id"]) for r in rows} == wanted
    texts = dict(line.split("\t") for line in Path(tiny_collection, "collection.tsv").read_text().splitlines())
    queries = dict(line.split("\t") for line in Path(tiny_collection, "queries.train.tsv").read_text().splitlines())
    model = AutoModelForSequenceClassification.from_pretrained(job.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    for row in rows[:: len(rows) // 12]:
        pair = (queries[row["query_id"]], texts[row["passage_id"]])
        with torch.no_grad():
            logits = model(**tokenizer(*pair, truncation=True, max_length=48, return_tensors="pt")).logits[0]
        assert row["score"] == pytest.approx(float(logits[1] - logits[0]), abs=1e-4)
    # Again, with one part missing: that one alone is made, and comes out the same.
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(job.out).glob("_rows/train-*.npy")}
    os.remove(os.path.join(job.out, "train-000001.parquet"))
    # With as many threads as before: on some processors their number moves the last bit of a product.
    assert score_candidates(job, CrossEncoderConfig(actors=1), QUERIES) == (2, 2 * (1 + DEPTH))
    for name, (changed, data) in before.items():
        path = Path(job.out, "_rows", name)
        assert path.read_bytes() == data
        assert (path.stat().st_mtime_ns == changed) == (name != "train-000001.npy")


def test_training_sees_scored_pairs_alone(ray_session: None, job: CrossEncoderJob, tiny_backbone: str) -> None:
    """A whole step from the files of the stage: its loss is that of the scored pairs, in Python floats."""
    start = Path(job.run) / "start"
    settings = ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)
    ColBERT.from_backbone(tiny_backbone, settings, seed=1).save(start)
    task = TrainingTask(
        "distill", job.run, str(start), "x", 17,
        DistillConfig(
            steps=4, batch_size=6, learning_rate=1e-3, objective="cross_encoder", loss="kl", temperature=2.0,
            negatives=2, negatives_depth=DEPTH,
        ),
    )  # fmt: skip
    model = ColBERT.from_pretrained(start)
    reader = InputReader(task, model.tokenizer)
    batch = reader.plan.batch(0)
    loss = float(TrainingStep(model, task, "fp32")(reader.read(0)))
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    rows = pa.concat_tables(pq.read_table(p) for p in sorted(Path(job.out).glob("*.parquet"))).to_pylist()
    known = {(r["query_id"], r["passage_id"]): r["score"] for r in rows}
    with torch.no_grad():
        tokenizer = model.tokenizer
        queries = model.encode_queries(*tokenizer.queries([reader.query_texts[i] for i in batch.queries_B.tolist()]))
        passages = tokenizer.passages(reader.collection.texts(batch.passages_BM.reshape(-1)))
        scores = maxsim(queries, *model.encode_passages(*tokenizer.pad(passages))).tolist()
    flat, total = batch.passages_BM.reshape(-1).tolist(), 0.0
    for row, query in enumerate(batch.queries_B.tolist()):
        own = row * 3
        columns = {flat[own]: own}
        for column, passage in enumerate(flat):
            if (f"q{query}", f"p{passage}") in known and passage != query:
                columns.setdefault(passage, column)
        teacher = {n: known[f"q{query}", f"p{p}"] / 2.0 for p, n in columns.items()}
        teacher[own] = max(teacher.values())
        parts = {n: math.exp(s - max(teacher.values())) for n, s in teacher.items()}
        log_sum = math.log(sum(math.exp(scores[row][n] - scores[row][own]) for n in teacher)) + scores[row][own]
        for n, part in parts.items():
            target = part / sum(parts.values())
            total += target * (math.log(target) - scores[row][n] + log_sum)
        assert len(columns) >= 3  # its positive and both of its negatives
    assert loss == pytest.approx(total / 6, abs=1e-5)
