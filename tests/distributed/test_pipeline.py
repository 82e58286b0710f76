"""The whole job on a tiny collection through real Ray: artifacts, resuming, and what a change runs again."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ckd_ray.checks import load_config
from ckd_ray.config.schema import DistillConfig
from ckd_ray.data import Collection, build
from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.step import TrainingStep
from ckd_ray.distill.task import TrainingTask
from ckd_ray.errors import UserError
from ckd_ray.evaluate.runs import read_trec_run
from ckd_ray.labels.files import ExpansionReader
from ckd_ray.model import ColBERT
from ckd_ray.pipeline import graph
from ckd_ray.pipeline.baselines import measure_baselines
from ckd_ray.pipeline.generations import run_generations
from ckd_ray.pipeline.runner import StageReport, run_stages
from ckd_ray.pipeline.stages import teacher
from ckd_ray.runs import artifact
from ckd_ray.runs.directory import RunContext
from ckd_ray.store import EmbeddingStore, shard_name
from tests.finished import Finished
from tests.here import in_this_process
from tests.support import classifier, flip_bit, overrides

pytestmark = pytest.mark.usefixtures("ray_session")


def run(shared: Finished, storage: Path, *more: str, **options: object) -> list[StageReport]:
    """The run of `storage`, a copy of the shared one, with changes."""
    return run_stages(load_config(None, shared.values(storage, *more)), **options)


@pytest.fixture(scope="session")
def finished(finished_run: Finished) -> Path:
    """The storage of the run that all share, to be read alone."""
    return finished_run.storage


def test_the_score_scale_is_measured_once_and_the_student_has_its_teacher_s(finished: Path) -> None:
    about = {
        role: json.loads((finished / "tiny" / role / "training.json").read_text()) for role in ("teacher", "student")
    }
    scale = about["teacher"]["score_scale"]
    assert scale > 0 and about["student"]["score_scale"] == scale
    for role in about:
        assert ColBERT.from_pretrained(finished / "tiny" / role).settings.score_scale == scale
    assert about["student"]["settings"]["loss"] == "decoupled" and "margin" not in about["student"]["settings"]


def test_what_the_targets_were_like_is_recorded(finished: Path) -> None:
    lines = (finished / "tiny" / "student" / "metrics.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        assert 0 < record["target_entropy"] <= math.log(7) + 1e-6
        assert 0 < record["target_entropy_share"] <= 1 and 0 <= record["label_mass"] <= 1
    figures = json.loads((finished / "tiny" / "student" / "_manifest.json").read_text())["figures"]
    assert figures["target_entropy"] > 0 and figures["score_scale"] > 0
    assert b"distill/label_mass" in next((finished / "tiny" / "student" / "tensorboard").iterdir()).read_bytes()


def test_rankings_have_the_contract_s_columns_and_are_exact(finished: Path) -> None:
    folder = finished / "tiny" / "rankings"
    table = pa.concat_tables([pq.read_table(p) for p in sorted(folder.glob("train-*.parquet"))])
    assert table.schema.field("query_id").type == pa.string()
    assert table.schema.field("passage_id").type == pa.string()
    assert table.schema.field("rank").type == pa.int32()
    assert table.schema.field("score").type == pa.float32()
    frame = table.to_pandas()
    assert frame.groupby("query_id").size().eq(20).all() and frame["query_id"].nunique() == 24
    queries = EmbeddingStore.open(str(finished / "tiny/embeddings/queries.train"))
    passages = EmbeddingStore.open(str(finished / "tiny/embeddings/passages"))
    rows = queries.gather(np.array([3])).embeddings_TD.float()
    documents = passages.gather(np.arange(60)).split()
    literal = np.array([float((rows @ d.float().T).max(1).values.sum()) for d in documents])
    mine = frame[frame["query_id"] == "q3"].sort_values("rank")
    assert mine["passage_index"].tolist() == np.lexsort((np.arange(60), -literal))[:20].tolist()
    assert np.allclose(mine["score"], np.sort(literal)[::-1][:20], atol=1e-4)


def test_labels_have_the_contract_s_columns(finished: Path) -> None:
    folder = finished / "tiny" / "labels"
    table = pq.read_table(next(iter(folder.glob("train-*.parquet"))))
    assert table.schema.field("feedback_ids").type.value_type == pa.string()
    assert table.schema.field("expansion").type.value_type == pa.list_(pa.float32(), 16)
    assert table.schema.field("idf").type.value_type == pa.float32()
    assert table.schema.field("token_ids").type.value_type == pa.int32()
    rankings = pq.read_table(next(iter((finished / "tiny/rankings").glob("train-*.parquet")))).to_pandas()
    for i, row in enumerate(table.to_pylist()):
        top = rankings[(rankings["query_id"] == row["query_id"]) & (rankings["rank"] <= 3)]["passage_id"].tolist()
        assert row["feedback_ids"] == top
        assert row["idf"] == sorted(row["idf"], reverse=True)
        assert len(row["expansion"]) == len(row["idf"]) == len(row["token_ids"]) <= 8
        expansion, weights = ExpansionReader.open(str(folder), "train").select(np.array([i]), 4, 0.5)
        kept = min(4, len(row["idf"]))
        assert np.allclose(weights[0, :kept], 0.5 * np.array(row["idf"][:kept]))
        assert np.allclose(expansion[0, :kept], np.array(row["expansion"])[:kept])


def test_evaluation_files(finished: Path) -> None:
    folder = finished / "tiny" / "evaluation"
    measures = json.loads((folder / "measures.json").read_text())
    assert set(measures["splits"]) == {"dev", "test"}
    assert measures["MRR@10"] == measures["splits"]["test"]["student"]["MRR@10"]
    run_file = read_trec_run(str(folder / "student.dev.run"))
    assert run_file.groupby("query_id").size().eq(50).all()
    first = {q: g.sort_values("rank")["doc_id"].tolist() for q, g in run_file.groupby("query_id")}
    per_query = json.loads((folder / "student.dev.per_query.json").read_text())
    for query, ranked in first.items():
        rank = ranked.index(f"p{query[1:]}") + 1 if f"p{query[1:]}" in ranked else 99
        assert per_query["MRR@10"][query] == pytest.approx(1 / rank if rank <= 10 else 0)


def test_the_encoder_as_it_is_ranks_by_the_cosine_of_pooled_vectors(finished: Path, finished_run: Finished) -> None:
    """Against one text at a time, its token outputs averaged, all pairs compared."""
    from transformers import AutoModel, AutoTokenizer

    hf, encoder = (
        AutoTokenizer.from_pretrained(finished_run.backbone),
        AutoModel.from_pretrained(finished_run.backbone).eval(),
    )

    def vector(text: str) -> np.ndarray:
        ids = hf(text, add_special_tokens=False, truncation=True, max_length=62)["input_ids"]
        with torch.no_grad():
            rows = encoder(torch.tensor([[hf.cls_token_id, *ids, hf.sep_token_id]])).last_hidden_state[0]
        mean = rows.double().mean(0).numpy()
        return mean / np.linalg.norm(mean)

    collection = Collection.open(str(finished / "tiny"))
    passages = np.stack([vector(text) for text in collection.iter_passages(0, 60)])
    queries, folder = collection.queries("dev"), finished / "tiny" / "baselines" / "encoder"
    ranked = read_trec_run(str(folder / "encoder.dev.run"))
    for query, text in zip(queries.ids, queries.texts, strict=True):
        cosine = dict(zip(collection.passage_ids(list(range(60))), passages @ vector(text), strict=True))
        mine = ranked[ranked["query_id"] == query].sort_values("rank")
        best = sorted(cosine.values(), reverse=True)[:50]
        # Vectors are kept in fp16, so neighbours closer than that may stand the other way round.
        assert [cosine[p] for p in mine["doc_id"]] == pytest.approx(best, abs=1e-3)
        assert mine["score"].tolist() == pytest.approx(best, abs=1e-3)
        clear = [i for i, (a, b) in enumerate(itertools.pairwise(best)) if a - b > 2e-3]
        for i in clear:
            above = {p for p, value in cosine.items() if value > best[i] - 1e-3}
            assert set(mine["doc_id"][: i + 1]) == above
    per_query = json.loads((folder / "encoder.dev.per_query.json").read_text())["MRR@10"]
    firsts = {q: g.sort_values("rank")["doc_id"].tolist()[:10] for q, g in ranked.groupby("query_id")}
    for query, top in firsts.items():
        assert per_query[query] == pytest.approx(1 / (top.index(f"p{query[1:]}") + 1) if f"p{query[1:]}" in top else 0)


def test_the_baselines_leave_measures_and_runs_and_a_table(finished: Path) -> None:
    run_folder = finished / "tiny"
    for name in ("encoder", "bm25"):
        files = {path.name for path in (run_folder / "baselines" / name).iterdir()}
        splits = {f"{name}.{split}.{kind}" for split in ("dev", "test") for kind in ("run", "per_query.json")}
        assert files == {"_manifest.json", "measures.json", *splits}
    assert [p.name for p in sorted((run_folder / "baselines").iterdir())] == ["bm25", "encoder"]
    table = json.loads((run_folder / "evaluation" / "table.json").read_text())
    measures = json.loads((run_folder / "evaluation" / "measures.json").read_text())["splits"]
    assert set(measures["dev"]) == {"teacher", "student"} and table["left_out"] == {}
    for split, rows in table["splits"].items():
        for name, row in rows.items():
            assert list(row["systems"]) == ["encoder", "bm25", "teacher", "student"]
            assert {cell["n"] for cell in row["systems"].values()} == {6}
            assert row["systems"]["student"]["mean"] == pytest.approx(measures[split]["student"][name])
            comparison = json.loads((run_folder / "evaluation" / "comparison.json").read_text())[split][name]
            assert row["student_minus"]["teacher"]["p"] == comparison["difference_p"]
    assert table["verdict"]["split"] == "dev"
    card = (run_folder / "student" / "README.md").read_text()
    assert table["verdict"]["text"] in card and "| dev | 6 | BM25 |" in card and "| **student** |" in card


def test_a_backbone_that_is_a_colbert_model_is_no_baseline(
    finished: Path, finished_run: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    student = str(finished / "tiny" / "student")
    config = load_config(None, overrides(finished, student, finished_run.collection))
    found = measure_baselines(RunContext.of(config), ["dev"], ["encoder"])
    assert found.folders == {} and "late-interaction (ColBERT) model (ckd-ray)" in found.left_out["encoder"]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("baselines:")]
    assert said == [f"baselines: encoder is left out: {found.left_out['encoder']}"]
    assert (finished / "tiny/baselines/encoder/_manifest.json").exists(), "that of the other backbone stays"


def test_student_is_a_checkpoint_that_transformers_reads(finished: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = finished / "tiny" / "student"
    assert AutoModel.from_pretrained(folder).config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"
    student, teacher = ColBERT.from_pretrained(folder), ColBERT.from_pretrained(finished / "tiny" / "teacher")
    moved = (student.projection.weight - teacher.projection.weight).abs().max()
    assert 0 < float(moved) < 0.01


def test_a_second_run_does_nothing(finished_run: Finished, tmp_path: Path) -> None:
    finished_run.copy(tmp_path)
    reports = run(finished_run, tmp_path)
    assert all(r.skipped for r in reports)


ALTERED = (
    "corpus/part-00000.parquet",
    "queries/train.parquet",
    "rankings/train-000000.parquet",
    "rankings/_rows/train.npy",
)


def test_altered_files_are_made_again_before_they_are_read(
    finished: Path, tmp_path: Path, finished_run: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    """One bit of each; they are named, and what comes out is what came out before."""
    finished_run.copy(tmp_path)
    kept = [*ALTERED, "labels/train-000000.parquet", "labels/_rows/train-000000.npy"]
    before = {name: (tmp_path / "tiny" / name).read_bytes() for name in kept}
    for name in ALTERED:
        flip_bit(tmp_path / "tiny" / name, len(before[name]) // 2)
    reports = run(finished_run, tmp_path, start="label", until="label")
    said = capfd.readouterr().err
    for name in ALTERED:
        assert f"tiny/{name}: its bytes do not match its checksum" in said
    assert [r.name for r in reports if not r.skipped] == ["collection", "retrieve", "label"]
    for name, data in before.items():
        assert (tmp_path / "tiny" / name).read_bytes() == data, name
    assert all(r.skipped for r in run(finished_run, tmp_path, until="label"))


@pytest.mark.soak
def test_a_teacher_that_comes_out_differently_is_followed(
    finished: Path, tmp_path: Path, finished_run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the same settings, other weights. What is left of the former teacher's is not mixed with them."""
    finished_run.copy(tmp_path)
    flip_bit(tmp_path / "tiny/teacher/model.safetensors", 5000)

    def other(context: RunContext, fingerprint: str) -> dict[str, Any]:
        figures = teacher.run(context, fingerprint)
        path = tmp_path / "tiny/teacher/projection.safetensors"
        flip_bit(path, path.stat().st_size - 1)
        return figures

    changed = [replace(stage, run=other) if stage is teacher.STAGE else stage for stage in graph.STAGES]
    monkeypatch.setattr(graph, "STAGES", tuple(changed))
    reports = run(finished_run, tmp_path, start="retrieve", until="retrieve")
    assert [r.name for r in reports if not r.skipped] == ["teacher", "embed", "retrieve"]
    one, two = (EmbeddingStore.open(str(at / "tiny/embeddings/passages")) for at in (finished, tmp_path))
    assert one.manifest["sha256"] == two.manifest["sha256"]  # as many embeddings, of the same tokens
    assert [s["sha256"] for s in one.manifest["shards"]] != [s["sha256"] for s in two.manifest["shards"]]


def test_a_collection_that_cannot_be_read_any_more_leaves_the_former_one(
    finished: Path, tmp_path: Path, finished_run: Finished
) -> None:
    shutil.copytree(finished / "tiny" / "corpus", tmp_path / "tiny" / "corpus")
    shutil.copytree(finished / "tiny" / "queries", tmp_path / "tiny" / "queries")
    shutil.copytree(finished_run.collection, tmp_path / "source")
    with (tmp_path / "source" / "collection.tsv").open("a") as file:
        file.write("no tab here\n")
    with pytest.raises(UserError, match=r"collection\.tsv"):
        run(finished_run, tmp_path, f"collection.path={tmp_path / 'source'}", until="collection")
    assert Collection.open(str(tmp_path / "tiny")).num_passages == 60
    assert run(finished_run, tmp_path, until="collection")[0].skipped


def test_queries_of_another_time_than_the_corpus_are_noticed(
    finished: Path, tmp_path: Path, finished_run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the new queries and before the new corpus: both are whole, and their numbers do not fit."""
    finished_run.copy(tmp_path)
    write, calls = build._write_manifest, list[str]()

    def killed(folder: str, *rest: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(folder, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build, "_write_manifest", killed)
        run(finished_run, tmp_path, "collection.limit=30", until="collection")
    before = (finished / "tiny/queries/_manifest.json").read_bytes()
    assert (tmp_path / "tiny/queries/_manifest.json").read_bytes() != before
    reports = run(finished_run, tmp_path, start="retrieve", until="retrieve")
    assert [r.name for r in reports if not r.skipped] == ["collection", "retrieve"]
    assert (tmp_path / "tiny/queries/_manifest.json").read_bytes() == before


@pytest.mark.soak
def test_a_finished_training_is_not_lost_before_it_is_in_the_manifest(
    finished: Path, tmp_path: Path, finished_run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_run.copy(tmp_path)

    def killed(uri: str, files: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(artifact, "_with_digests", killed)
        run(finished_run, tmp_path, start="distill", until="distill")
    (left,) = (tmp_path / "tiny" / "checkpoints").glob("distill-*")
    steps = (tmp_path / "tiny/student/metrics.jsonl").read_bytes()
    run(finished_run, tmp_path, until="distill")
    # The losses carry the times of their steps, so equal bytes are steps that were not done again.
    assert (tmp_path / "tiny/student/metrics.jsonl").read_bytes() == steps
    assert not left.exists()


@pytest.mark.soak
def test_an_evaluated_run_takes_a_further_split(finished: Path, tmp_path: Path, finished_run: Finished) -> None:
    finished_run.copy(tmp_path)
    shutil.rmtree(tmp_path / "tiny" / "student_embeddings")
    run(finished_run, tmp_path, "evaluate.splits=[dev]")
    stores = tmp_path / "tiny" / "student_embeddings"
    assert not (stores / "queries.test").exists()
    before = {p: p.stat().st_mtime_ns for p in stores.glob("passages/*.arrow")}
    run(finished_run, tmp_path)
    assert (tmp_path / "tiny/evaluation/student.test.run").exists()
    assert {p: p.stat().st_mtime_ns for p in stores.glob("passages/*.arrow")} == before


def test_a_broken_shard_alone_is_made_again(finished_run: Finished, tmp_path: Path) -> None:
    folder = finished_run.copy(tmp_path) / "embeddings" / "passages"
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("*.arrow")}
    victim = folder / shard_name(2)
    os.truncate(victim, 100)
    reports = {r.name: r.skipped for r in run(finished_run, tmp_path, until="embed")}
    assert reports == {"collection": True, "teacher": True, "embed": False}
    for name, (changed, data) in before.items():
        assert (folder / name).read_bytes() == data, name
        assert ((folder / name).stat().st_mtime_ns == changed) == (name != victim.name)


def test_contrastive_needs_no_labels(finished_run: Finished, tmp_path: Path) -> None:
    finished_run.copy(tmp_path)
    with in_this_process():
        reports = run(finished_run, tmp_path, "distill.objective=contrastive", until="distill")
    assert "label" not in {r.name for r in reports}
    assert [r.name for r in reports if not r.skipped] == ["distill"]


def test_a_given_teacher_is_taken_over_and_followed(finished: Path, tmp_path: Path, finished_run: Finished) -> None:
    """`teacher.checkpoint` replaces training; another checkpoint under the same name is noticed."""
    given = tmp_path / "given"
    model = ColBERT.from_pretrained(finished / "tiny" / "student")
    model.save(given)
    values = (f"teacher.checkpoint={given}",)
    reports = run(finished_run, tmp_path, *values, until="teacher")
    assert reports[-1].figures == {"given": str(given)}
    taken = ColBERT.from_pretrained(tmp_path / "tiny" / "teacher")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), taken.parameters(), strict=True))
    assert run(finished_run, tmp_path, *values, until="teacher")[-1].skipped
    ColBERT.from_pretrained(finished / "tiny" / "teacher").save(given)
    assert not run(finished_run, tmp_path, *values, until="teacher")[-1].skipped


def test_a_recomputed_teacher_gives_the_losses_of_the_stored_one(finished: Path) -> None:
    run_folder = finished / "tiny"
    losses = {}
    for source in ("store", "recompute"):
        task = TrainingTask(
            stage="distill", run=str(run_folder), start=str(run_folder / "teacher"), fingerprint=source, seed=17,
            settings=DistillConfig(
                steps=4, batch_size=6, learning_rate=1e-3, expansion_size=4, negatives=3, negatives_depth=15,
                accumulate=2, teacher_embeddings=source,
            ),
            teacher=str(run_folder / "teacher"),
        )  # fmt: skip
        model = ColBERT.from_pretrained(run_folder / "student")
        teacher = ColBERT.from_pretrained(run_folder / "teacher") if source == "recompute" else None
        reader, step = InputReader(task, model.tokenizer), TrainingStep(model, task, "fp32", teacher=teacher)
        losses[source] = [float(step(reader.read(i))) for i in range(4)]
        assert (reader.read(0).teacher.passages is None) == (source == "recompute")
    assert losses["store"] == pytest.approx(losses["recompute"], abs=1e-3)
    assert min(losses["store"]) > 0


def test_the_student_of_a_generation_is_the_teacher_of_the_next(finished_run: Finished, tmp_path: Path) -> None:
    before = finished_run.copy(tmp_path)
    config = load_config(None, finished_run.values(tmp_path))
    with in_this_process():
        (first, _), (second, more) = run_generations(config, 2)
    assert first == config
    folder = before / "generation-2"
    assert second.run.storage == str(before) and RunContext.of(second).paths.root == str(folder)
    assert [r.name for r in more if r.skipped] == ["collection"], "the corpus is copied"
    weights = [
        ColBERT.from_pretrained(path).state_dict()
        for path in (before / "student", folder / "teacher", folder / "student")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    assert all(report.skipped for _, found in run_generations(config, 2) for report in found)


def test_cross_encoder_labels_from_a_model_and_then_from_a_file(
    finished: Path, tmp_path: Path, finished_run: Finished
) -> None:
    """The stage runs for its objective alone; its own Parquet is a file of scores like any other."""
    model = classifier(tmp_path / "model", finished_run.backbone, 1)
    chosen = ("distill.objective=cross_encoder", f"cross_encoder.model={model}", "cross_encoder.maxlen=48")
    folder = finished_run.copy(tmp_path) / "cross_scores"
    with in_this_process():
        reports = run(finished_run, tmp_path, *chosen, until="distill")
    assert [r.name for r in reports if not r.skipped] == ["cross_encoder", "distill"]
    assert reports[-1].figures["first_loss"] > 0
    table = pa.concat_tables([pq.read_table(p) for p in sorted(folder.glob("train-*.parquet"))])
    # of each labelled query the labelled passage and negatives_depth others
    assert table.num_rows == reports[-2].figures["pairs"] == 21 * 16
    pq.write_table(table, tmp_path / "scores.parquet")
    chosen = ("distill.objective=cross_encoder", f"cross_encoder.scores={tmp_path / 'scores.parquet'}")
    report = run(finished_run, tmp_path, *chosen, until="cross_encoder")[-1]
    assert not report.skipped and report.figures["labelled_scored"] == report.figures["negatives_scored"] == 1
    again = pa.concat_tables([pq.read_table(p) for p in sorted(folder.glob("train-*.parquet"))])
    key = [("query_id", "ascending"), ("passage_id", "ascending")]
    assert again.sort_by(key).equals(table.sort_by(key))
    assert run(finished_run, tmp_path, *chosen, until="cross_encoder")[-1].skipped
