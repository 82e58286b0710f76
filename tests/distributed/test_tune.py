"""A search through real Ray Tune and Ray Train: what it shares, what it leaves, and that a killed one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ckd_ray.checks import load_config
from ckd_ray.config import Config
from ckd_ray.config.schema import LabelConfig
from ckd_ray.data import Collection
from ckd_ray.labels.feedback import expand_ranked
from ckd_ray.model.colbert import load_tokenizer
from ckd_ray.runs.directory import RunContext
from ckd_ray.store import EmbeddingStore
from ckd_ray.tune.job import run_tune
from tests.finished import Finished
from tests.support import overrides, tensorboard_events

SPACE = (
    "tune.space={distill.temperature: {loguniform: [0.2, 5.0]}, distill.beta: {choice: [0.1, 1.0]}, "
    "label.clusters: {choice: [4, 8]}, distill.learning_rate: {choice: [0.001, 0.01]}}"
)
CHANGES = (
    "teacher.steps=1", "distill.steps=4", "distill.temperature=0.25", "distill.beta=0.3", "embed.passages_per_shard=64",
    SPACE, "tune.measurements=2",
)  # fmt: skip
SMALL = ("tune.trials=4", "tune.label_kept=2", "tune.dev_queries=6", "tune.dev_passages=30", "tune.search=random")


def settings(storage: Path, backbone: str, collection: str, *more: str) -> list[str]:
    return overrides(storage, backbone, collection, *CHANGES, *SMALL, *more)


@pytest.mark.slow
def test_a_small_search_in_a_finished_run(ray_session: None, finished_run: Finished, tmp_path: Path) -> None:
    """One trial, of the configuration's own values, through Ray Tune and Ray Train: nothing is made again for it."""
    run = finished_run.copy(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "run.json"}
    space = "tune.space={distill.temperature: {loguniform: [0.2, 5.0]}}"
    changes = ("tune.search=random", "tune.trials=1", "tune.measurements=2", "distill.temperature=0.25", space)
    config = load_config(None, finished_run.values(tmp_path, *changes, "tune.retrain=false"))
    summary = run_tune(config)
    (trial,) = pq.read_table(run / "tune" / "trials.parquet").to_pylist()
    assert trial["state"] == "finished" and trial["steps"] == 6 and trial["distill.temperature"] == 0.25
    assert summary["best"]["trial"] == 0 and 0 < summary["best"]["mrr@10"] == trial["mrr@10"] <= 1
    assert load_config(str(run / "tune" / "best.yaml")).distill.temperature == 0.25
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list((run / "checkpoints").glob("distill-*")) and not list((run / "tune").rglob("student-*"))


@pytest.mark.soak
def test_a_search_shares_what_is_upstream_and_leaves_a_configuration(
    ray_session: None, tmp_path: Path, tiny_backbone: str, tiny_collection: str
) -> None:
    config = load_config(None, settings(tmp_path, tiny_backbone, tiny_collection, "tracking=[tensorboard]"))
    summary = run_tune(config)
    run = tmp_path / "tiny"
    trials = pq.read_table(run / "tune" / "trials.parquet").to_pylist()
    assert [t["trial"] for t in trials] == [0, 1, 2, 3]
    assert {t["state"] for t in trials} <= {"finished", "stopped"} and trials[0]["state"] == "finished"
    assert len({tuple(t[key] for key in summary["default"]) for t in trials}) == 4
    assert trials[0]["distill.temperature"] == 0.25 and trials[0]["label.clusters"] == 8
    best = max((t for t in trials if t["state"] == "finished"), key=lambda t: (t["mrr@10"], -t["trial"]))
    assert summary["best"]["trial"] == best["trial"]
    found = load_config(str(run / "tune" / "best.yaml"))
    assert found.distill.temperature == best["distill.temperature"]
    assert found.label.clusters == best["label.clusters"] and found.model == config.model
    _the_tracker_has_a_run_for_each_trial(run, trials)
    # Nothing of the trials is left, and labels of another setting lie beside those of the run.
    assert not list((run / "checkpoints").glob("distill-*")) and not list((run / "tune").rglob("student-*"))
    assert json.loads((run / "run.json").read_text())["config"]["label"]["clusters"] == 8
    _first_pass_is_the_teacher_s_own_ranking(config, summary)
    before = (run / "tune" / "trials.parquet").stat().st_mtime_ns, (run / "embeddings" / "_manifest.json").stat()
    again = run_tune(config)
    assert again["trials"] == summary["trials"] and again["best"] == summary["best"]
    assert (run / "embeddings" / "_manifest.json").stat().st_mtime_ns == before[1].st_mtime_ns


def _the_tracker_has_a_run_for_each_trial(run: Path, trials: list[dict]) -> None:
    (folder,) = (run / "tune").glob("search-*/tracking")
    assert sorted(path.name for path in folder.iterdir()) == [f"trial-{t['trial']:05d}" for t in trials]
    for trial in trials:
        found = tensorboard_events(folder / f"trial-{trial['trial']:05d}" / "tensorboard")
        assert found["trial/best_mrr_10"] == [(0, pytest.approx(trial["mrr@10"]))]
        assert found["trial/mrr_10"][-1][0] == trial["steps"]
        assert b"distill.temperature" in found["_hparams_/session_start_info"][0][1]
    for student in (run, *run.glob("tune/best")):  # the configuration's own and the winner, in full
        assert len(tensorboard_events(student / "tracking" / "tensorboard")["distill/loss"]) == 4


def _first_pass_is_the_teacher_s_own_ranking(config: Config, summary: dict) -> None:
    """Every combination against the teacher's score written out, over the top of an exact ranking."""
    assert summary["first_pass"][0]["values"] == {"label.clusters": 8, "distill.beta": 0.3}
    assert len(summary["first_pass"]) == 5  # the configuration's own, and the grid of four
    paths = RunContext.of(config).paths
    passages = EmbeddingStore.open(paths.passages)
    store = EmbeddingStore.open(paths.query_embeddings("dev"))
    asked_BQD = store.gather(np.arange(store.num_passages)).embeddings_TD.view(store.num_passages, -1, 16).double()
    rows = [p.double() for p in passages.gather(np.arange(passages.num_passages)).split()]
    every = torch.cat(rows)
    token_ids = np.concatenate([passages.shard(i).token_ids for i in range(passages.num_shards)])
    qrels = Collection.open(paths.root).qrels("dev")
    silent = load_tokenizer(paths.teacher).special_token_ids

    def similarity(a_RD: torch.Tensor, passage_LD: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(a_RD, passage_LD).square().amin(1)

    plain_BN = np.array([[float(similarity(q, p).sum()) for p in rows] for q in asked_BQD])
    top_BN = np.argsort(-plain_BN, axis=1, kind="stable")[:, : config.retrieve.depth]
    for entry in summary["first_pass"]:
        labels = LabelConfig(clusters=entry["values"]["label.clusters"])
        expansions = expand_ranked(
            passages,
            top_BN[:, :3],
            labels,
            neighbours=lambda v: token_ids[torch.cdist(v.double(), every).topk(10, largest=False).indices.numpy()],
            special_token_ids=silent,
        )
        kept, weights = expansions.select(config.distill.expansion_size, entry["values"]["distill.beta"])
        ranks = []
        for query, top_N in enumerate(top_BN):
            wanted = set(qrels.passage_index[qrels.query_index == query].tolist())
            extra = [float((weights[query] * similarity(kept[query].double(), rows[p])).sum()) for p in top_N]
            order = top_N[np.argsort(-(plain_BN[query, top_N] + extra), kind="stable")][:10].tolist()
            hits = [i for i, passage in enumerate(order, 1) if passage in wanted]
            ranks.append(1 / hits[0] if hits else 0.0)
        assert entry["mrr@10"] == pytest.approx(np.mean(ranks), abs=1e-6)


@pytest.mark.soak
def test_a_killed_search_goes_on_to_the_same_trials(tmp_path: Path, tiny_backbone: str, tiny_collection: str) -> None:
    def command(storage: Path) -> list[str]:
        values = settings(
            storage, tiny_backbone, tiny_collection, "tune.search=optuna", "tune.trials=3", "tune.retrain=false"
        )
        chosen = [word for value in values for word in ("--set", value)]
        return [sys.executable, "-m", "ckd_ray", "tune", "--cluster", "local", "--json", *chosen]

    straight = subprocess.run(command(tmp_path / "straight"), capture_output=True, text=True, timeout=400)
    assert straight.returncode == 0, straight.stderr[-3000:]
    killed = subprocess.Popen(
        command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    records = tmp_path / "killed" / "tiny" / "tune"
    while time.monotonic() < deadline and killed.poll() is None:
        if any('"finished"' in p.read_text() for p in records.glob("search-*/trials/trial-00000.json")):
            break
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert any(records.glob("search-*/trials/*.json")) and not (records / "best.yaml").exists()
    again = subprocess.run(command(tmp_path / "killed"), capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr[-3000:]
    wanted, found = json.loads(straight.stdout), json.loads(again.stdout)
    assert [{**t, "seconds": 0} for t in found["trials"]] == [{**t, "seconds": 0} for t in wanted["trials"]]
    assert found["best"] == wanted["best"]
