"""The stream through several actors gives the bits that one gives; a pool that cannot start ends with numbers."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

import ckd_ray.embed.stream as stream
import ckd_ray.ray_util.through_pool as through_pool
from ckd_ray.checks import load_config
from ckd_ray.config import EmbedConfig
from ckd_ray.data import Collection, build_collection
from ckd_ray.embed.learn_codec import with_codec
from ckd_ray.embed.stream import EmbedJob, embed_texts
from ckd_ray.errors import JobError
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.encoder import Encoded, TextEncoder
from ckd_ray.ray_util import pool_start
from ckd_ray.ray_util.actor_pool import Pool, place_pool
from ckd_ray.ray_util.frames import let_go
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.codec_training import sample_spans
from tests.support import write_collection


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> str:
    folder = tmp_path_factory.mktemp("run")
    config = load_config(None, ["collection.format=msmarco", f"collection.path={tiny_collection}"])
    build_collection(config.collection, str(folder))
    ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)).save(
        folder / "teacher"
    )
    return str(folder)


def job_of(run: str, out: Path, texts: str = "passages") -> EmbedJob:
    return EmbedJob(run, texts, f"{run}/teacher", str(out / texts), f"test/{texts}", token_budget=200, precision="fp32")


class Uneven:
    """The real encoder with pauses, longer for some shards: they are finished out of order."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder, self.dim = encoder, encoder.dim

    def passages(self, tokens: Sequence[Any]) -> Encoded:
        time.sleep(0.1 * (int(tokens[0][2]) % 3))
        return self.encoder.passages(tokens)

    def queries(self, texts: Sequence[str]) -> Encoded:
        return self.encoder.queries(texts)


def make_uneven(job: EmbedJob, threads: int) -> Uneven:
    torch.set_num_threads(1)
    return Uneven(TextEncoder(ColBERT.from_pretrained(job.checkpoint), token_budget=job.token_budget))


def test_two_actors_write_the_bits_of_one_and_of_none(ray_session: None, run: str, tmp_path: Path) -> None:
    collection = Collection.open(run)
    spans = [(i, min(i + 7, collection.num_passages)) for i in range(0, collection.num_passages, 7)]
    count = len(collection.queries("dev").ids)
    stores: dict[int, list[EmbeddingStore]] = {}
    for actors in (1, 2):
        out = tmp_path / str(actors)
        jobs = [(job_of(run, out), spans), (job_of(run, out, "queries.dev"), [(0, count)])]
        stores[actors] = embed_texts(jobs, EmbedConfig(actors=actors), make_encoder=make_uneven)
    for one, two in zip(stores[1], stores[2], strict=True):
        assert [s["sha256"] for s in one.manifest["shards"]] == [s["sha256"] for s in two.manifest["shards"]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encoder = TextEncoder(ColBERT.from_pretrained(f"{run}/teacher"), token_budget=200)
        for i, (first, stop) in enumerate(spans):
            texts = collection.texts(range(first, stop))
            expected = encoder.passages(encoder.model.tokenizer.passages(texts))
            shard = stores[2][0].shard(i)
            assert (shard.first, shard.lengths.tolist()) == (first, expected.lengths.tolist())
            assert shard.token_ids.tolist() == expected.token_ids.tolist()
            assert torch.equal(shard.embeddings(), expected.embeddings_TD)
    finally:
        torch.set_num_threads(threads)


def test_a_codec_is_learned_from_a_sample_with_gaps(ray_session: None, tmp_path: Path, tiny_backbone: str) -> None:
    """Of a corpus that is larger than the sample, spans are drawn here and there."""
    source = write_collection(tmp_path / "source", passages=400)
    config = load_config(None, ["collection.format=msmarco", f"collection.path={source}"])
    build_collection(config.collection, str(tmp_path))
    ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=8)).save(
        tmp_path / "teacher"
    )
    count = Collection.open(str(tmp_path)).num_passages
    drawn = sample_spans(count, 17)
    assert any(stop < after for (_, stop), (after, _) in itertools.pairwise(drawn))
    job = replace(job_of(str(tmp_path), tmp_path / "embeddings"), codec="residual2")
    job = with_codec(job, count, EmbedConfig(), seed=17)
    assert job.codec_digest and not (tmp_path / "embeddings/passages/sample").exists()
    store = embed_texts([(job, [(0, 100), (100, 164)])], EmbedConfig())[0]
    assert store.manifest["codec_digest"] == job.codec_digest and store.num_passages == 164


@pytest.mark.slow
def test_shards_that_share_a_block_are_all_written(
    ray_session: None, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corpus of more shards than Ray Data should have blocks."""
    monkeypatch.setattr(through_pool, "MOST_BLOCKS", 3)
    count = Collection.open(run).num_passages
    store = embed_texts([(job_of(run, tmp_path), [(i, i + 4) for i in range(0, count, 4)])], EmbedConfig())[0]
    assert store.num_shards == count // 4 and store.firsts.tolist() == list(range(0, count, 4))
    assert np.all(store.lengths() > 0)


def test_work_begins_without_an_actor_that_finds_no_room(
    ray_session: None, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a machine has left between the plan and the start."""
    monkeypatch.setattr(through_pool, "_FEW_UNITS", 0)  # actors, and no tasks
    monkeypatch.setattr(stream, "place_pool", lambda *_, **__: Pool(3, 0.9, 0.0, 1, 1, 0.1))
    store = embed_texts([(job_of(run, tmp_path), [(i, i + 10) for i in range(0, 60, 10)])], EmbedConfig())[0]
    assert store.num_shards == 6 and np.all(store.lengths() > 0)


def test_a_pool_that_cannot_start_ends_with_numbers_and_leaves_room(
    ray_session: None, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the room is taken between the plan and the start. The next pool of this process gets its actors."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # a kept record would keep the traceback
    monkeypatch.setattr(pool_start, "WITHIN_S", 8.0)
    monkeypatch.setattr(through_pool, "_FEW_UNITS", 0)  # actors, and no tasks
    monkeypatch.setattr(stream, "place_pool", lambda *_, **__: Pool(3, 2.1, 0.0, 1, 1, 0.1))
    with pytest.raises(
        JobError, match=r"3 actors of 2.1 CPU and 0 GPU none has started within 8 s(.|\n)*1 node with 2 CPU"
    ):
        embed_texts([(job_of(run, tmp_path), [(0, 20), (20, 40), (40, 60)])], EmbedConfig())
    try:
        embed_texts([(job_of(run, tmp_path), [(0, 20), (20, 40), (40, 60)])], EmbedConfig())
    except JobError as error:  # the runner looks for broken files of the store, in tasks, while it handles the error
        let_go(error)
        assert ray.get(ray.remote(num_cpus=1.5)(lambda: "room").remote(), timeout=120) == "room"
    monkeypatch.undo()
    assert place_pool("auto", "auto", limit=2, patience=60).actors  # the processes end one after the other
