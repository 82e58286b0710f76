"""A run up to its rankings, and labelled, made in this process without Ray."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np

from ckd_ray.checks import load_config
from ckd_ray.config import Config, LabelConfig
from ckd_ray.data import Collection, build_collection
from ckd_ray.files import write_json_atomic
from ckd_ray.labels.files import manifest_of_labels
from ckd_ray.labels.stage import LabelJob, label_part
from ckd_ray.model import ColBERT
from ckd_ray.model.encoder import Encoded, TextEncoder
from ckd_ray.pipeline.runner import run_stages
from ckd_ray.ray_util.parts import part_file, query_spans
from ckd_ray.retrieve.rankings import write_ranking_matrix, write_ranking_part
from ckd_ray.store import EmbeddingStore, Ragged, shard_name, write_manifest, write_shard
from ckd_ray.store.codec import Codec, Float16, Residual, load_codec, save_codec
from ckd_ray.store.codec_training import learn_codec
from tests.exact_index import ExactIndex
from tests.support import overrides


def write_store(folder: Path, encoded: Encoded | Ragged, shards: int, codec: Codec | None = None) -> EmbeddingStore:
    """The rows of all texts as a store of so many shards; fp16 without a codec."""
    offsets = np.concatenate([[0], np.cumsum(encoded.lengths)])
    headers = []
    for i, (low, high) in enumerate(pairwise(np.linspace(0, len(encoded.lengths), shards + 1).astype(int).tolist())):
        rows = slice(int(offsets[low]), int(offsets[high]))
        header, _ = write_shard(
            str(folder / shard_name(i)),
            fingerprint="f",
            index=i,
            first=low,
            lengths=encoded.lengths[low:high],
            token_ids=encoded.token_ids[rows],
            embeddings_TD=encoded.embeddings_TD[rows],
            codec=codec or Float16(encoded.embeddings_TD.shape[1]),
        )
        headers.append(header)
    write_manifest(str(folder), "f", len(headers))
    return EmbeddingStore.open(str(folder))


def recode(folder: Path, name: str, codec: Residual | None = None) -> None:
    """Write a store of 4 shards again with a residual codec, learned from all of its rows when None."""
    old = EmbeddingStore.open(str(folder))
    read = old.gather(np.arange(old.num_passages))
    shutil.rmtree(folder)
    digest = save_codec(codec or learn_codec(name, read.embeddings_TD, old.num_tokens), str(folder))
    write_store(folder, read, 4, load_codec(name, old.dim, str(folder), digest))


def ranked_run(storage: Path, backbone: str, collection: str, *more: str, depth: int = 20) -> tuple[Config, Encoded]:
    """A run named `tiny` below `storage`: collection, teacher (the bare encoder), stores of 4 shards, rankings.

    Returns:
        its configuration, and the encoded passages (to cut them into shards otherwise).
    """
    first = load_config(None, overrides(storage, backbone, collection))
    given = storage / "given"
    m = first.model
    from ckd_ray.model import ColBERTSettings

    settings = ColBERTSettings(dim=m.dim, query_maxlen=m.query_maxlen, doc_maxlen=m.doc_maxlen)
    ColBERT.from_backbone(backbone, settings, seed=3).save(given)
    config = load_config(None, overrides(storage, backbone, collection, f"teacher.checkpoint={given}", *more))
    run_stages(config, until="teacher")
    run = storage / config.run.name
    model = ColBERT.from_pretrained(run / "teacher")
    encoder = TextEncoder(model, device="cpu", token_budget=2048, precision="fp32")
    texts = Collection.open(str(run))
    passages = encoder.passages(model.tokenizer.passages(texts.iter_passages(0, texts.num_passages)))
    store = write_store(run / "embeddings" / "passages", passages, 4)
    asked = texts.queries("train")
    queries = encoder.queries(asked.texts)
    write_store(run / "embeddings" / "queries.train", queries, 1)
    index = ExactIndex(passages.embeddings_TD.half(), store.lengths())
    scores, found = index.search(queries.embeddings_TD.half().float().view(len(asked.ids), -1, store.dim), depth)
    write_rankings(run, asked.ids, scores, found)
    return config, passages


def labelled_run(storage: Path, backbone: str, collection: str, *more: str) -> str:
    """`ranked_run` with the labels of its 24 training queries; the folder of the run."""
    ranked_run(storage, backbone, collection, *more)
    made = storage / "tiny"
    settings = LabelConfig(feedback_passages=3, clusters=8, token_vote="feedback")
    job = LabelJob(
        run=str(made), split="train", checkpoint=str(made / "teacher"), passages=str(made / "embeddings" / "passages"),
        rankings=str(made / "rankings"), out=str(made / "labels"), settings=settings,
    )  # fmt: skip
    label_part(job, None, 0, 0, 24)
    manifest = {**manifest_of_labels(256, "train", settings.depths), "made_of": "m"}
    write_json_atomic(str(made / "labels" / "_manifest.json"), manifest)
    return str(made)


def with_rankings(run: Path, backbone: str, collection: str) -> str:
    """`run` with its collection, and a ranking of query i: passages i, i + 1, ... i + 9 (i is its labelled one)."""
    build_collection(load_config(None, overrides(run, backbone, collection)).collection, str(run))
    passages = np.arange(24)[:, None] + np.arange(10)[None]
    write_ranking_part(
        str(run / "rankings" / part_file("train", 0)),
        first_query=0,
        query_ids=[f"q{i}" for i in range(24)],
        scores_BK=-np.sort(passages.astype(np.float32)),
        passages_BK=passages.astype(np.int64),
        passage_ids=[f"p{i}" for i in passages.reshape(-1)],
    )
    return str(run)


def write_rankings(run: Path, query_ids: list[str], scores: np.ndarray, found: np.ndarray) -> None:
    """The rankings of the training queries, parts and matrix."""
    collection, folder = Collection.open(str(run)), str(run / "rankings")
    spans = query_spans(len(query_ids))
    for part, (low, high) in enumerate(spans):
        kept = found[low:high][found[low:high] >= 0]
        write_ranking_part(
            f"{folder}/{part_file('train', part)}",
            first_query=low,
            query_ids=query_ids[low:high],
            scores_BK=scores[low:high],
            passages_BK=found[low:high],
            passage_ids=collection.passage_ids(kept),
        )
    write_ranking_matrix(folder, "train", spans, found.shape[1])
