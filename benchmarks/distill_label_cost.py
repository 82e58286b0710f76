"""What a label costs: retrieval and collective label of a training query, against a cross-encoder of the same backbone
that scores its 100 candidates."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import figure
from distill_run import DistillRun

from ckd_ray.collective.special_cells import SpecialCells
from ckd_ray.config import Config
from ckd_ray.cross_encoder.candidates import CandidateReader
from ckd_ray.cross_encoder.classifier import PairClassifier, PairTokenizer
from ckd_ray.data import Collection
from ckd_ray.labels.feedback import expand_depths
from ckd_ray.pipeline.labelling import vote_way
from ckd_ray.pipeline.search_engine import search_settings
from ckd_ray.retrieve.shard_range import ShardRange
from ckd_ray.store import EmbeddingStore


def label_cost(run: DistillRun, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Both in this process with all its threads, on a sample, in turn; seconds a query."""
    labelled, judged, rounds = (64, 1, 2) if args.quick else (256, 2, 3)
    labels, judge = _Labels(run), _Judge(run)
    ours, theirs, pairs = [], [], 0
    for i in range(rounds):
        ours.append(labels.seconds(i * labelled, labelled) / labelled)
        seconds, scored = judge.seconds(i * judged, judged)
        theirs.append(seconds / judged)
        pairs += scored
    # What is built once (an index, the cells of the votes); every query of the run carries its share.
    share = labels.opening / labels.queries.num_passages
    cost = min(ours) + share
    settings["labels"] = {
        "labelled_queries": labelled * rounds,
        "judged_queries": judged * rounds,
        "judged_pairs": pairs,
        "pair_maxlen": judge.tokenizer.maxlen,
        "retrieve_and_label_seconds_a_query": round(cost, 5),
        "of_which_its_share_of_index_and_cells": round(share, 5),
        "cross_encoder_seconds_a_query": round(min(theirs), 4),
        "engine": labels.engine,
        "votes": labels.votes,
        "stages_of_the_run_seconds_a_query": _stage_seconds(run),
        "left_out": "loading the models",
    }
    return {"label_cost_vs_cross_encoder": figure(min(theirs) / cost, 8, "higher")}


def _stage_seconds(run: DistillRun) -> dict[str, float]:
    """What the stages of the run took, Ray and all, whenever that was."""
    found = {}
    for name in ("rankings", "labels"):
        manifest = json.loads((run.folder / name / "_manifest.json").read_text())
        count = manifest.get("figures", {}).get("count")
        if count:
            found[name] = round(manifest["seconds"] / count, 5)
    return found


class _Labels:
    """Retrieval and labelling of consecutive training queries, as the stages do them, in one process."""

    def __init__(self, run: DistillRun) -> None:
        self.store = EmbeddingStore.open(str(run.folder / "embeddings" / "passages"))
        self.queries = EmbeddingStore.open(str(run.folder / "embeddings" / "queries.train"))
        config = Config.model_validate(run.config)
        self.settings, self.depth, count = config.label, config.retrieve.depth, self.queries.num_passages
        self.silent = run.model().tokenizer.special_token_ids
        search = search_settings(config, self.store, count)
        self.engine, self.votes = search.engine, vote_way(config, self.store, count)
        started = time.perf_counter()
        self.range = ShardRange(self.store, list(range(self.store.num_shards)), replace(search, index=None))
        self.cells = None
        if self.votes == "estimate":
            self.cells = SpecialCells.of_store(self.store, self.silent, seed=config.run.seed)
        self.opening = time.perf_counter() - started
        if self.votes not in ("estimate", "feedback", self.engine):
            raise SystemExit(f"this run votes by {self.votes} and retrieves by {self.engine}: not measured here")
        self._label(0, 4)

    def seconds(self, first: int, count: int) -> float:
        started = time.perf_counter()
        self._label(first, count)
        return time.perf_counter() - started

    def _label(self, first: int, count: int) -> None:
        rows = self.queries.gather(np.arange(first, first + count) % self.queries.num_passages)
        queries_BQD = rows.embeddings_TD.float().reshape(count, -1, self.store.dim)
        _, passages_BK = self.range.search(queries_BQD, self.depth)
        searched = self.votes not in ("estimate", "feedback")
        expand_depths(
            self.store,
            passages_BK,
            self.settings,
            neighbours=(lambda v: self.range.nearest_token_ids(v, self.settings.voters)[1]) if searched else None,
            special_token_ids=self.silent,
            in_special_cell=self.cells.in_special_cell if self.cells else None,
        )


class _Judge:
    """A classifier on the run's own backbone (its head is random: time does not depend on weights)."""

    def __init__(self, run: DistillRun) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        collection = Collection.open(str(run.folder))
        self.collection, self.queries = collection, collection.queries("train").texts
        depth = run.config["distill"]["negatives_depth"]
        self.candidates = CandidateReader(str(run.folder), run.config["collection"]["positive_grade"], depth)
        config = AutoConfig.from_pretrained(run.folder / "teacher", num_labels=1)
        config.architectures = None
        model = run.config["model"]
        with tempfile.TemporaryDirectory() as folder:
            AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
            AutoTokenizer.from_pretrained(run.folder / "teacher").save_pretrained(Path(folder))
            # As much of the passage as the retriever sees.
            self.tokenizer = PairTokenizer(folder, min(256, model["doc_maxlen"] + model["query_maxlen"]))
            self.model = PairClassifier(folder, token_budget=16384)
        self.labelled = self.candidates.positives.labelled_queries

    def seconds(self, first: int, count: int) -> tuple[float, int]:
        """Of reading, tokenising and scoring the candidates of some queries, and how many pairs that were."""
        started, pairs = time.perf_counter(), 0
        for query in self.labelled[first : first + count].tolist():
            passages = self.candidates.read(query, query + 1).all()[0]
            texts = self.collection.texts(passages)
            self.model.score(self.tokenizer([self.queries[query]] * len(texts), texts))
            pairs += len(texts)
        return time.perf_counter() - started, pairs
