"""How time and memory of retrieval grow with the corpus: generated passages, a stand-in for the encoder.

`growth_exponent`: the slope of log(processor seconds) over log(passages) for candidates from centroids and exact
re-ranking of a fixed number of queries, the index included; 1 is linear. `growth_memory_exponent`: the same of the
peak of resident memory above what the process had before. Every size runs in a process of its own, on one thread;
seconds are those of the processor, so that what else the machine does does not count. The stand-in embeds a passage as
random unit rows around 4,096 common centres, 8 to 24 of 32 dimensions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import figure, note

DIM, QUERY_ROWS, CENTRES, QUERIES, SHARD = 32, 8, 4096, 64, 50_000
FULL, QUICK = (10_000, 100_000, 1_000_000), (2_000, 8_000, 32_000)


def figures(run: Any, quick: bool, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """See the module's docstring; `run` is not used."""
    points = []
    for passages in QUICK if quick else FULL:
        done = subprocess.run([sys.executable, __file__, str(passages)], capture_output=True, text=True, check=True)
        points.append(json.loads(done.stdout.splitlines()[-1]))
        note(f"{passages:,} passages: {points[-1]}")
    settings["growth"] = points
    sizes = np.log([p["passages"] for p in points])
    slopes = [np.polyfit(sizes, np.log([max(1e-3, p[key]) for p in points]), 1)[0] for key in ("seconds", "peak_mib")]
    return {
        "growth_exponent": figure(slopes[0], 1.1, "lower"),
        "growth_memory_exponent": figure(slopes[1], None, "lower"),
    }


def _embed(first: int, stop: int, centres: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    generator = torch.Generator().manual_seed(first + 1)
    lengths = torch.randint(8, 25, (stop - first,), generator=generator)
    topics = torch.randint(0, CENTRES, (int(lengths.sum()),), generator=generator)
    noise = torch.randn(len(topics), DIM, generator=generator) * 0.08
    return lengths.numpy().astype(np.int32), F.normalize(centres[topics] + noise, dim=1).half()


def measure(passages: int, folder: Path) -> dict[str, float]:
    """Write a store of so many passages (not timed), then build the lists and search, timed."""
    from ckd_ray.retrieve.shard_range import SearchSettings, ShardRange
    from ckd_ray.store import EmbeddingStore, shard_name, write_manifest, write_shard
    from ckd_ray.store.codec import load_codec, save_codec
    from ckd_ray.store.codec_training import choose_centroids, train_codec

    centres = F.normalize(torch.randn(CENTRES, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    count = min(4096, choose_centroids(16 * passages))
    _, sample = _embed(0, min(passages, 10_000), centres)
    codec = train_codec("residual2", sample, count)
    codec = load_codec("residual2", DIM, str(folder), save_codec(codec, str(folder)))
    headers = []
    for i, first in enumerate(range(0, passages, SHARD)):
        lengths, rows = _embed(first, min(passages, first + SHARD), centres)
        header, _ = write_shard(
            str(folder / shard_name(i)),
            fingerprint="growth",
            index=i,
            first=first,
            lengths=lengths,
            token_ids=np.zeros(len(rows), np.int32),
            embeddings_TD=rows,
            codec=codec,
        )
        headers.append(header)
    write_manifest(str(folder), "growth", len(headers))
    store = EmbeddingStore.open(str(folder))
    _, asked = _embed(10**7, 10**7 + QUERIES, centres)
    queries = asked[: QUERIES * QUERY_ROWS].view(QUERIES, QUERY_ROWS, DIM)
    _reset_peak()
    before = _status("VmRSS")
    started = time.process_time()
    served = ShardRange(store, list(range(store.num_shards)), SearchSettings("centroids", nprobe=8, candidates=256))
    built = time.process_time() - started
    served.search(queries, 100)
    seconds = time.process_time() - started
    return {
        "passages": passages,
        "seconds": round(seconds, 3),
        "build_seconds": round(built, 3),
        "peak_mib": round(_status("VmHWM") - before, 1),
    }


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status(key: str) -> float:
    """MiB of a line of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key + ":"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(int(sys.argv[1]), Path(scratch))))
