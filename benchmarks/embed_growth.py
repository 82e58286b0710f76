"""A million generated passages through a tiny encoder: does the stream slow down, does its memory grow?"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import figure, note
from embed_memory import PeakMemory

from ckd_ray.checks import load_config
from ckd_ray.config import EmbedConfig
from ckd_ray.data import build_collection
from ckd_ray.embed.stream import EmbedJob, embed_texts, plan_shards
from ckd_ray.progress import set_quiet
from ckd_ray.ray_util.session import connected
from ckd_ray.store import EmbeddingStore, shard_name

WORDS = ["".join(parts) for parts in itertools.product("bdfgklmnprst", "aeiou", "bdfgklmnprst")]


def figures(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """embed_last_tenth_rate, embed_peak_gib, embed_driver_peak_gib."""
    set_quiet(True)
    count = 100_000 if args.quick else 1_000_000
    folder = tempfile.mkdtemp(prefix="ckd-ray-growth-")
    try:
        note(f"generating {count:,} passages")
        write_corpus(f"{folder}/data", count)
        config = load_config(None, ["collection.format=msmarco", f"collection.path={folder}/data"])
        build_collection(config.collection, f"{folder}/run")
        write_tiny_model(f"{folder}/run/teacher")
        job = EmbedJob(
            run=f"{folder}/run",
            texts="passages",
            checkpoint=f"{folder}/run/teacher",
            out=f"{folder}/run/embeddings/passages",
            fingerprint="growth",
            token_budget=config.embed.token_budget,
            precision="fp32",
        )
        with connected("local"), PeakMemory() as memory:
            started = time.perf_counter()
            store = embed_texts([(job, plan_shards(count, "auto"))], EmbedConfig())[0]
            seconds = time.perf_counter() - started
        assert store.num_passages == count
        first, last = tenths(committed(store))
        settings["growth"] = {
            "passages": count,
            "tokens": store.num_tokens,
            "store_gib": round(store.manifest["bytes"] / 2**30, 2),
            "passages_per_second": round(count / seconds),
            "processes": memory.processes,
        }
        note(f"{settings['growth']}; passages a second: first tenth {first:,.0f}, last {last:,.0f}")
        return {
            "embed_last_tenth_rate": figure(last / first, 0.9, "higher"),
            "embed_peak_gib": figure(memory.all_gib, 6, "lower"),
            "embed_driver_peak_gib": figure(memory.driver_gib, 1.5, "lower"),
        }
    finally:
        shutil.rmtree(folder)


def write_corpus(folder: str, count: int) -> None:
    """`count` passages of 5 to 35 words of a vocabulary of 720, and one query with its label, which a run needs."""
    os.makedirs(folder)
    rng = random.Random(17)
    with open(f"{folder}/collection.tsv", "w") as file:
        for i in range(count):
            file.write(f"{i}\t{' '.join(rng.choices(WORDS, k=rng.randint(5, 35)))}\n")
    Path(f"{folder}/queries.train.tsv").write_text(f"q\t{WORDS[0]}\n")
    Path(f"{folder}/qrels.train.tsv").write_text("q\t0\t0\t1\n")


def write_tiny_model(folder: str) -> None:
    """A random BERT of one layer and 32 dimensions with the words as its vocabulary; 16 numbers a token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from ckd_ray.model import ColBERT, ColBERTSettings

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]"]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    settings = ColBERTSettings(dim=16, query_maxlen=16, doc_maxlen=48)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    ColBERT(BertModel(config, add_pooling_layer=False), fast, settings).save(folder)


def committed(store: EmbeddingStore) -> list[tuple[float, int]]:
    """(time at which it was committed, passages) of every shard."""
    shards = store.manifest["shards"]
    return [(os.stat(f"{store.uri}/{shard_name(i)}").st_mtime, shard["passages"]) for i, shard in enumerate(shards)]


def tenths(shards: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Passages a second over the first and over the last tenth of them; the shards, (time, passages), differ in size.

    The clock starts with the first shard: what the actors take to start is no growth.
    """
    times, sizes = np.array(sorted(shards)).T
    done = np.cumsum(sizes)
    tenth = done[-1] / 10
    # Where a tenth ends within a shard, that shard's passages count as evenly spread over its time.
    (first,) = np.interp([done[0] + tenth], done, times) - times[0]
    (last,) = times[-1] - np.interp([done[-1] - tenth], done, times)
    return float(tenth / first), float(tenth / last)
