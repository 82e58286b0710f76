"""Top-100 retrieval against fast-plaid, over the same embeddings, queries and cores.

    python benchmarks/search_peer.py --run RUN --peer-python ENV/bin/python [--quick]
    (tests/exchange/environments ENVS fast-plaid makes the environment ENVS/fast-plaid)

RUN is a run with an fp16 store. `queries_vs_fast_plaid`: queries a second of exact search (the engine of the retrieve
stage, in this process), over those of fast-plaid at the fewest probes of 8, 16, 32, ... with which its recall@100 is
0.98, or the most that were tried. `index_seconds_vs_fast_plaid` and `index_memory_vs_fast_plaid`: time and peak memory
of `export --what index --format fast-plaid`, its codec learned there, over those of fast-plaid's own index, which takes
all embeddings in memory. Exact search needs no index. Prints one JSON object. Shapes: B queries, Q rows, D dimensions.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

DEPTH, WANTED = 100, 0.98
MOST_PROBES = 256


def main() -> None:
    from common import arguments, emit, figure, machine, note

    given = {"required": True, "metavar": "RUN", "help": "a run with an fp16 store of passages"}
    python = {"required": True, "metavar": "PYTHON", "help": "of an environment with fast-plaid"}
    args = arguments(__doc__ or "", run=given, peer_python=python)
    before = machine()
    count = 64 if args.quick else 256
    with tempfile.TemporaryDirectory() as folder:
        ours = _ours(Path(args.run), Path(folder), count)
        note(f"exact search: {ours['rate']:.1f} queries/s")
        export = _child([sys.executable, os.path.abspath(__file__), "export", args.run, f"{folder}/export"])
        note(f"our index in its form: {export['seconds']:.1f} s, {export['peak_mib']:.0f} MiB")
        peer = _child([args.peer_python, os.path.abspath(__file__), "peer", folder])
    note(f"fast-plaid: {peer['rate']:.1f} queries/s at recall {peer['recall']:.4f}, {peer['probes']} probes")
    settings = {"queries": count, "depth": DEPTH, "passages": ours["passages"], "embeddings": ours["embeddings"]}
    settings |= {"ours": ours, "export": export, "fast_plaid": peer}
    emit(
        settings,
        {
            "queries_vs_fast_plaid": figure(ours["rate"] / peer["rate"], 5, "higher"),
            "fast_plaid_recall_at_100": figure(peer["recall"], None, "higher"),
            "index_seconds_vs_fast_plaid": figure(export["seconds"] / peer["index_seconds"], 1, "lower"),
            "index_memory_vs_fast_plaid": figure(export["peak_mib"] / peer["index_peak_mib"], 1, "lower"),
        },
        before,
    )


def _child(command: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if command[0] != sys.executable:
        environment["PYTHONPATH"] = ""
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _ours(run: Path, folder: Path, count: int) -> dict[str, Any]:
    """Exact search, best of three; leaves embeddings, queries and the exact rankings in `folder` for the peer."""
    import torch

    from ckd_ray.retrieve.exact import Scorer, search_all
    from ckd_ray.retrieve.query_blocks import rows_until_last
    from ckd_ray.retrieve.shard_range import SearchSettings, ShardRange
    from ckd_ray.store import EmbeddingStore

    store = EmbeddingStore.open(str(run / "embeddings" / "passages"))
    if store.manifest["codec"] != "fp16":
        raise SystemExit("this benchmark needs a run with embed.codec: fp16")
    queries = EmbeddingStore.open(str(run / "embeddings" / "queries.train"))
    chosen = np.sort(np.random.default_rng(3).choice(queries.num_passages, count, replace=False))
    asked_BQD = queries.gather(chosen).embeddings_TD.float().view(count, -1, queries.dim)
    asked_BQD = asked_BQD[:, : int(rows_until_last(asked_BQD).max())]
    torch.set_num_threads(os.cpu_count() or 1)
    served = ShardRange(store, range(store.num_shards), SearchSettings("exact"))
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        _, found_BK = search_all(Scorer(asked_BQD, served.rows), DEPTH)
        best = min(best, time.perf_counter() - started)
    rows_TD = torch.cat([store.shard(i).embeddings() for i in range(store.num_shards)])
    np.save(folder / "rows.npy", rows_TD.numpy())
    np.save(folder / "lengths.npy", np.asarray(store.lengths()))
    np.save(folder / "queries.npy", asked_BQD.numpy())
    np.save(folder / "truth.npy", found_BK)
    return {"rate": count / best, "passages": store.num_passages, "embeddings": store.num_tokens}


def _export(run: str, out: str) -> dict[str, Any]:
    from ckd_ray.search.export import export_stored

    started = time.perf_counter()
    export_stored(run, "index", "fast-plaid", system="teacher", out=out)
    return {"seconds": time.perf_counter() - started, "peak_mib": _peak_mib()}


def _peer(folder: Path) -> dict[str, Any]:
    """In the peer's own Python."""
    import torch
    from fast_plaid import search

    rows, lengths = torch.from_numpy(np.load(folder / "rows.npy")), np.load(folder / "lengths.npy")
    documents = list(torch.split(rows.float(), lengths.tolist()))
    queries = [torch.from_numpy(q[q.any(1)]) for q in np.load(folder / "queries.npy")]
    truth = np.load(folder / "truth.npy")
    index = search.FastPlaid(index=str(folder / "theirs"), device="cpu")
    started = time.perf_counter()
    index.create(documents_embeddings=documents)
    seconds, peak = time.perf_counter() - started, _peak_mib()
    tried = []
    probes = 8
    while True:
        best = float("inf")
        for _ in range(2):
            started = time.perf_counter()
            found = index.search(queries, top_k=DEPTH, n_ivf_probe=probes, n_full_scores=8192, show_progress=False)
            best = min(best, time.perf_counter() - started)
        hits = [len(set(t.tolist()) & {n for n, _ in f}) for t, f in zip(truth, found, strict=True)]
        tried.append({"probes": probes, "rate": len(queries) / best, "recall": sum(hits) / truth.size})
        if tried[-1]["recall"] >= WANTED or probes >= MOST_PROBES:
            break
        probes *= 2
    reached = [t for t in tried if t["recall"] >= WANTED]
    chosen = reached[0] if reached else max(tried, key=lambda t: t["recall"])
    return {**chosen, "tried": tried, "index_seconds": seconds, "index_peak_mib": peak, "torch": torch.__version__}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("peer", "export"):
        answer = _peer(Path(sys.argv[2])) if sys.argv[1] == "peer" else _export(sys.argv[2], sys.argv[3])
        print(json.dumps(answer), flush=True)
    else:
        main()
