"""The embed stage, Ray and store included, against two loops without either.

The padded loop goes through the file in its order, 32 passages a batch, as the usual libraries do. The ideal loop sorts
by length, fills batches to the same token budget as the stage, and writes nothing. Loops run on an even sample of the
corpus (their rate does not depend on its size) with all cores in one process, or on one GPU, with the device and the
precision that the stage takes; the stage runs on all of it, and the time its actors take to start counts. Loop, stage
and loop alternate, so that other load falls on all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import figure, note
from embed_memory import PeakMemory
from embed_source import Source, source

from ckd_ray.config import EmbedConfig
from ckd_ray.embed.stream import embed_texts, plan_shards
from ckd_ray.model import ColBERT
from ckd_ray.model.encoder import Precision, TextEncoder, choose_precision, computing
from ckd_ray.ray_util.session import connected

PEERS_BATCH = 32


def figures(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """embed_vs_padded_loop, embed_vs_ideal_loop."""
    at = source(args)
    collection = at.collection
    count = collection.num_passages
    wanted = 400 if args.quick else 1200
    texts = collection.texts(range(0, count, max(1, count // wanted)))
    torch.set_num_threads(os.cpu_count() or 1)
    model, plain = (ColBERT.from_pretrained(f"{at.folder}/teacher").eval() for _ in range(2))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # as the stage's actors choose
    precision, reason = choose_precision(model, "auto", device, threads=1)
    plain.to(device)
    job = at.job("", precision=precision)
    encoder = TextEncoder(model, device=device, token_budget=job.token_budget, precision=job.precision)
    loops: dict[str, Callable[[], Any]] = {
        "padded": lambda: padded_loop(plain, texts, device, precision),
        "ideal": lambda: encoder.passages(model.tokenizer.passages(texts)),
    }
    encoder.passages(model.tokenizer.passages(texts[:PEERS_BATCH]))  # warm
    padded_loop(plain, texts[:PEERS_BATCH], device, precision)
    seconds = dict.fromkeys(loops, 0.0)
    cpu = dict.fromkeys(loops, 0.0)
    stage_seconds = 0.0
    for turn in ("loops", "stage", "loops"):
        if turn == "stage":
            stage_seconds = stage(at, count, precision, settings)
            continue
        for name, loop in loops.items():
            started, before = time.perf_counter(), time.process_time()
            loop()
            seconds[name] += time.perf_counter() - started
            cpu[name] += time.process_time() - before
    rates = {name: 2 * len(texts) / value for name, value in seconds.items()} | {"stage": count / stage_seconds}
    settings["rates"] = {"passages": count, "sample": len(texts), "device": device.type}
    settings["rates"] |= {"precision": f"{precision} ({reason})"}
    settings["rates"] |= {f"{name}_passages_per_second": round(rate, 2) for name, rate in rates.items()}
    # Where other jobs share the cores, processor time says more than the clock.
    spent = {name: value / 2 / len(texts) for name, value in cpu.items()} | {"stage": settings.pop("stage_cpu") / count}
    settings["rates"] |= {f"{name}_cpu_ms_a_passage": round(1000 * value, 2) for name, value in spent.items()}
    settings["rates"] |= {"stage_start_seconds": round(settings.pop("stage_start"), 1)}
    note(str(settings["rates"]))
    return {
        "embed_vs_padded_loop": figure(rates["stage"] / rates["padded"], 1.3, "higher"),
        "embed_vs_ideal_loop": figure(rates["stage"] / rates["ideal"], 0.92, "higher"),
    }


@torch.inference_mode()
def padded_loop(
    model: ColBERT, texts: list[str], device: torch.device, precision: Precision = "fp32"
) -> list[torch.Tensor]:
    """Float16 rows of every batch, on the CPU. Batches of 32 in the order of the file, each padded to its longest
    passage, by the model as it was loaded, which is on `device`."""
    found = []
    tokenizer = model.tokenizer
    for start in range(0, len(texts), PEERS_BATCH):
        ids_NL, mask_NL = tokenizer.pad(tokenizer.passages(texts[start : start + PEERS_BATCH]))
        with computing(device, precision):
            rows_NLD, keep_NL = model.encode_passages(ids_NL.to(device), mask_NL.to(device))
        found.append(rows_NLD[keep_NL].to("cpu", torch.float16))
    return found


def stage(at: Source, count: int, precision: Precision, settings: dict[str, Any]) -> float:
    """Seconds of the stage on a fresh store, from the call to the closed store. Ray itself is up before."""
    out = tempfile.mkdtemp(prefix="ckd-ray-embed-")
    job = at.job(f"{out}/passages", precision=precision)
    try:
        with connected("local"):
            with PeakMemory(every=2, memory=False) as used:
                before, started = time.time(), time.perf_counter()
                store = embed_texts([(job, plan_shards(count, "auto"))], EmbedConfig())[0]
                seconds = time.perf_counter() - started
        settings["stage_cpu"] = used.cpu_seconds
        assert store.num_passages == count
        shards = [entry.stat().st_mtime for entry in os.scandir(job.out) if entry.name.endswith(".arrow")]
        settings["stage_start"] = min(shards) - before
        return seconds
    finally:
        shutil.rmtree(out)
