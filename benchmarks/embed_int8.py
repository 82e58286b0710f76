"""int8 on a CPU: how much faster than fp32, and what it costs in ranking.

Both precisions encode the same passages (those that dev queries are labelled with, and an even sample of the others)
and the dev queries, as `embed.precision: int8` would; exact search, MRR@10. One process, all cores.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np
import torch
from common import figure, note
from embed_codec import measured
from embed_source import source

from ckd_ray.model import ColBERT
from ckd_ray.model.encoder import TextEncoder
from ckd_ray.retrieve.exact import Scorer, search_all
from ckd_ray.retrieve.rows import FlatRows


def figures(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """int8_vs_fp32_rate, int8_mrr_ratio."""
    at = source(args)
    collection = at.collection
    labelled = np.unique(collection.qrels("dev").passage_index)
    wanted = 500 if args.quick else 4000
    others = np.arange(0, collection.num_passages, max(1, collection.num_passages // wanted))
    chosen = np.union1d(labelled[:wanted], others)
    queries = collection.queries("dev").texts
    torch.set_num_threads(os.cpu_count() or 1)
    seconds: dict[str, float] = {}
    means: dict[str, float] = {}
    budget = at.job("").token_budget
    texts = collection.texts(chosen)
    for precision in ("fp32", "int8"):
        model = ColBERT.from_pretrained(f"{at.folder}/teacher")
        encoder = TextEncoder(model, token_budget=budget, precision=precision)  # type: ignore[arg-type]
        tokens = model.tokenizer.passages(texts)
        encoder.passages(tokens[:64])  # warm
        started = time.perf_counter()
        rows = encoder.passages(tokens)
        seconds[precision] = time.perf_counter() - started
        rows_BQD = encoder.queries(queries).embeddings_TD.view(len(queries), -1, encoder.dim).float()
        flat = FlatRows(rows.embeddings_TD, rows.lengths)
        found_BK = np.concatenate([search_all(Scorer(part, flat), 10)[1] for part in rows_BQD.split(64)])
        means[precision] = measured(collection, chosen[found_BK])
        note(f"{precision}: {len(chosen) / seconds[precision]:.1f} passages/s, MRR@10 {means[precision]:.4f}")
    settings["int8"] = {"passages": len(chosen), "queries": len(queries)}
    settings["int8"] |= {f"{name}_passages_per_second": round(len(chosen) / s, 1) for name, s in seconds.items()}
    settings["int8"] |= {f"{name}_mrr10": round(value, 4) for name, value in means.items()}
    return {
        "int8_vs_fp32_rate": figure(seconds["fp32"] / seconds["int8"], 1.2, "higher"),
        "int8_mrr_ratio": figure(means["int8"] / means["fp32"], None, "higher"),
    }
