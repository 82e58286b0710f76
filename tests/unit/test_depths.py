"""Labels from several depths of feedback: their files, their weights, and everything that reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ckd_ray.collective.scores import expansion_weights
from ckd_ray.config.schema import DistillConfig, LabelConfig
from ckd_ray.distill.dev import mean_reciprocal_rank
from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.step import TrainingStep
from ckd_ray.distill.task import TrainingTask
from ckd_ray.files import write_json_atomic
from ckd_ray.inspection.inspect import inspect_query, render
from ckd_ray.inspection.labelled_run import LabelledRun
from ckd_ray.inspection.suggest import SuggestSettings, suggestions_of_part
from ckd_ray.labels.files import ExpansionReader, manifest_of_labels
from ckd_ray.labels.stage import LabelJob, label_part
from ckd_ray.model import ColBERT
from ckd_ray.model.maxsim import counted_rows
from ckd_ray.report.facts import gather
from ckd_ray.report.page import render_page
from ckd_ray.retrieve.rankings import read_ranking_matrix
from ckd_ray.runs.finished import open_finished
from ckd_ray.store import EmbeddingStore
from ckd_ray.tune import first_pass
from tests.labelled import ranked_run

QUERIES, CLUSTERS, SIZE, SHARE = 24, 8, 4, 0.3
NAME = "train-000000"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> Path:
    """`labels` are of the depths 1 and 3; `one` and `three` of one of them each, `listed` of the list [3]."""
    storage = tmp_path_factory.mktemp("depths")
    ranked_run(storage, tiny_backbone, tiny_collection, "label.feedback_passages=[1,3]")
    made = storage / "tiny"
    for folder, passages in (("labels", [1, 3]), ("one", 1), ("three", 3), ("listed", [3])):
        settings = LabelConfig(feedback_passages=passages, clusters=CLUSTERS, token_vote="feedback")
        job = LabelJob(
            run=str(made),
            split="train",
            checkpoint=str(made / "teacher"),
            passages=str(made / "embeddings" / "passages"),
            rankings=str(made / "rankings"),
            out=str(made / folder),
            settings=settings,
        )
        label_part(job, None, 0, 0, QUERIES)
        manifest = {**manifest_of_labels(256, "train", settings.depths), "made_of": "m"}
        write_json_atomic(str(made / folder / "_manifest.json"), manifest)
    write_json_atomic(str(made / "embeddings" / "_manifest.json"), {"made_of": "m"})
    return made


def reader(run: Path, folder: str) -> ExpansionReader:
    return ExpansionReader.open(str(run / folder), "train")


def literal_scores(run: Path, query: int, passages: list[int], beta: float | str) -> np.ndarray:
    """MaxSim, plus the mean over the depths of the score that the expansion of that depth alone adds."""
    rows = EmbeddingStore.open(str(run / "embeddings/queries.train")).gather(np.array([query])).embeddings_TD.float()
    store = EmbeddingStore.open(str(run / "embeddings/passages"))

    def best(a: torch.Tensor, passage_LD: torch.Tensor) -> float:
        return -float((a - passage_LD.float()).square().sum(1).min())

    scores = []
    for passage_LD in store.gather(np.array(passages)).split():
        of_depths = []
        for folder in ("one", "three"):
            expansion, idf = reader(run, folder).select(np.array([query]), SIZE)
            weights = idf[0] * beta if beta != "auto" else idf[0] * (SHARE / (1 - SHARE) * len(rows) / idf[0].sum())
            of_depths.append(sum(float(w) * best(c, passage_LD) for w, c in zip(weights, expansion[0], strict=True)))
        scores.append(sum(best(row, passage_LD) for row in rows) + np.mean(of_depths))
    return np.array(scores)


def test_weights_of_two_depths_by_hand() -> None:
    idf = torch.tensor([[6.0, 3.0, 1.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0, 2.0, 0.0], [0.0] * 6])
    rows = torch.tensor([30, 12, 12])
    assert torch.equal(expansion_weights(idf, rows, beta=0.5, depths=2), 0.25 * idf)
    # share / (1 - share) is 1/3: each depth of the first query holds 1/3 * 30 / 2, one without any idf nothing.
    wanted = torch.tensor([[3.0, 1.5, 0.5, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0, 0.0], [0.0] * 6])
    torch.testing.assert_close(expansion_weights(idf, rows, beta="auto", share=0.25, depths=2), wanted)
    assert expansion_weights(idf[:, :0], rows, beta="auto", depths=2).shape == (3, 0)
    with pytest.raises(ValueError, match="6 expansion embeddings are not 4 blocks"):
        expansion_weights(idf, rows, depths=4)


@pytest.mark.parametrize("beta", [0.7, "auto"])
@pytest.mark.parametrize("depths", [1, 2, 3])
def test_weights_equal_the_literal_version(beta: float | str, depths: int) -> None:
    idf = torch.rand(5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    idf[1, :4] = idf[2] = 0.0
    rows = torch.tensor([32, 12, 7, 1, 30])
    found = expansion_weights(idf, rows, beta=beta, share=SHARE, depths=depths)
    each = 12 // depths
    for b in range(5):
        for e in range(12):
            block = idf[b, e // each * each : (e // each + 1) * each]
            if beta == "auto":
                held = SHARE / (1 - SHARE) * float(rows[b]) / depths
                wanted = held * float(idf[b, e]) / float(block.sum()) if block.sum() else 0.0
            else:
                wanted = beta * float(idf[b, e]) / depths
            assert float(found[b, e]) == pytest.approx(wanted, rel=1e-12)


def test_each_block_is_the_labels_of_its_depth(run: Path) -> None:
    everything = np.arange(QUERIES)
    parts = zip(
        *(reader(run, folder).select(everything, CLUSTERS) for folder in ("labels", "one", "three")), strict=True
    )
    for both, one, three in parts:
        assert one.shape[1] == CLUSTERS and torch.equal(both, torch.cat([one, three], dim=1))
        assert not torch.equal(one, three)
    found, *alone = (pq.read_table(run / f / f"{NAME}.parquet").to_pylist() for f in ("labels", "one", "three"))
    for row, first, second in zip(found, *alone, strict=True):
        for column in ("expansion", "idf", "token_ids"):
            assert row[column] == first[column] + second[column]
        assert row["depths"] == [1] * len(first["idf"]) + [3] * len(second["idf"]) and "depths" not in first
        assert row["query_id"] == first["query_id"] and row["feedback_ids"] == second["feedback_ids"]
        assert len(row["feedback_ids"]) == 3
    assert json.loads((run / "labels" / "_manifest.json").read_text())["feedback_passages"] == [1, 3]


def test_a_list_of_one_depth_is_that_depth(run: Path) -> None:
    for name in (f"_rows/{NAME}.npy", f"{NAME}.parquet", "_manifest.json"):
        assert (run / "listed" / name).read_bytes() == (run / "three" / name).read_bytes()
    assert manifest_of_labels(5, "train", (3,)) == {"queries_per_part": 5, "split": "train"}


@pytest.mark.parametrize("size", [3, CLUSTERS, 99])
def test_select_gives_the_top_of_each_depth(run: Path, size: int) -> None:
    asked = np.random.default_rng(0).permutation(QUERIES)
    both = reader(run, "labels")
    assert (both.depths, both.blocks) == ((1, 3), 2) and reader(run, "three").blocks == 1
    found, alone = both.select(asked, size, 0.5), [reader(run, f).select(asked, size, 0.5) for f in ("one", "three")]
    assert found[0].shape[1] == 2 * min(size, CLUSTERS)
    assert torch.equal(found[0], torch.cat([embeddings for embeddings, _ in alone], 1))
    assert torch.equal(found[1], torch.cat([weights for _, weights in alone], 1))
    assert both.select(asked[:0], size)[0].shape[:2] == (0, 2 * size)


@pytest.mark.parametrize("beta", [0.3, "auto"])
def test_training_takes_the_mean_over_the_depths(run: Path, beta: float | str) -> None:
    settings = DistillConfig(
        steps=1,
        batch_size=3,
        negatives=2,
        negatives_depth=15,
        expansion_size=SIZE,
        beta=beta,
        expansion_share=SHARE,
        encoder_share=0.0,
        bm25_share=0.0,
    )
    teacher = str(run / "teacher")
    task = TrainingTask("distill", str(run), teacher, "f", seed=17, settings=settings)
    model = ColBERT.from_pretrained(run / "teacher")
    inputs = InputReader(task, model.tokenizer)
    read, batch = inputs.read(0), inputs.plan.batch(0)
    assert read.teacher is not None and read.teacher.depths == 2
    step = TrainingStep(model, task, "fp32")
    scores_BN = step._columns(step._teacher_scores(read), read)
    for query, row_N in zip(batch.queries_B.tolist(), scores_BN, strict=True):
        wanted_N = literal_scores(run, query, batch.passages_BM.reshape(-1).tolist(), beta)
        np.testing.assert_allclose(row_N.numpy(), wanted_N, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.3, "auto"])
def test_reports_and_the_first_pass_score_as_training_does(
    run: Path, beta: float | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = LabelledRun.open(str(run))
    opened.settings = opened.settings.model_copy(
        update={"beta": beta, "expansion_share": SHARE, "expansion_size": SIZE, "temperature": 2.0}
    )
    ranking = read_ranking_matrix(str(run / "rankings"), "train")
    sums = 0.0
    for query in range(QUERIES):
        passages = ranking[query].astype(np.int64)
        scores_N = literal_scores(run, query, passages.tolist(), beta)
        found = opened.distributions(query, passages)
        np.testing.assert_allclose(found.collective_scores, scores_N, rtol=1e-4)
        sums += mean_reciprocal_rank(scores_N[None], np.isin(passages, opened.positives.of(query))[None])
    suggested = suggestions_of_part(opened, 0, 0, QUERIES, SuggestSettings(QUERIES * 20, 0.0)).to_pylist()
    ranked = ranking[0, : opened.settings.negatives_depth].astype(np.int64)
    passages = np.concatenate([ranked, np.setdiff1d(opened.positives.of(0), ranked)])
    chances = opened.distributions(0, passages).collective
    others = [float(c) for c, p in zip(chances, passages, strict=True) if p not in opened.positives.of(0)]
    assert [s["score"] for s in suggested if s["query"] == 0] == pytest.approx(sorted(others, reverse=True), rel=1e-5)

    monkeypatch.setattr(first_pass, "_SPLIT", "train")
    way = {"labels": str(run / "labels"), "beta": beta, "share": SHARE, "size": SIZE, "floor": False}
    part = {"first": [0], "stop": [QUERIES]}
    judged = first_pass._judge_part(part, str(run), str(run / "teacher"), str(run / "rankings"), [way], 1)
    assert judged["sums"].to_pylist()[0] == pytest.approx([sums])


def test_inspect_shows_each_depth(run: Path) -> None:
    found = inspect_query(str(run), "q3", top=5)
    assert found["settings"]["feedback_passages"] == [1, 3] and len(found["feedback"]) == 3
    queries = EmbeddingStore.open(str(run / "embeddings/queries.train")).gather(np.array([3])).embeddings_TD[None]
    for depth, folder in ((1, "one"), (3, "three")):
        alone = pq.read_table(run / folder / f"{NAME}.parquet").to_pylist()[3]
        mine = [e for e in found["expansion"] if e["depth"] == depth]
        assert [e["token_id"] for e in mine] == alone["token_ids"] and [e["idf"] for e in mine] == alone["idf"]
        idf = torch.tensor([alone["idf"][:SIZE]])
        weights = expansion_weights(idf, counted_rows(queries), beta="auto", share=SHARE)[0] / 2
        wanted = [*weights.tolist(), *[0.0] * (len(mine) - len(weights))]
        assert [e["weight"] for e in mine] == pytest.approx(wanted, rel=1e-6)
    lines = render(found).splitlines()
    first, second = (lines.index(f"  from the top {depth} of the feedback") for depth in (1, 3))
    shown = [e for e in found["expansion"] if e["weight"]]
    assert [line.split()[0] for line in lines[first + 1 : first + 1 + SIZE]] == [e["token"] for e in shown[:SIZE]]
    assert [line.split()[0] for line in lines[second + 1 : second + 1 + SIZE]] == [e["token"] for e in shown[SIZE:]]
    assert sum("not counted" in line for line in lines) == 2
    assert any(f"({2 * SIZE} of {len(found['expansion'])} centroids count" in line for line in lines)
    page = render_page(gather(open_finished(str(run))))
    assert "from the top 1 of the feedback" in page and "from the top 3 of the feedback" in page
