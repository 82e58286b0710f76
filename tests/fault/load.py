"""How the product bears many small things: files of a store, and queries to label. Prints JSON, with peak memory.

    python -m tests.fault.load --files 10000 --shards 10000 --queries 5000000 --export 500000

`--files`: a corpus of so many Parquet files of ten passages is looked at, and built by four processes at once.
`--shards`: a store of so many shards of ten passages is written, closed, and read at random by eight processes at once,
each of which may have 256 files open. `--queries`: a split of so many generated queries is labelled, all of it, by the
stage as it is on two CPUs; meanwhile the memory of all processes is looked at, and then every part is read. `--export`:
so many queries are labelled and exported with 64 candidates each, as `ckd-ray export --what labels` does. `--tasks`:
so many parts of no work go through Ray Data, to see the driver's memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tests.fault.processes import below

DIM, TOKENS = 16, 4


def memory() -> tuple[float, float]:
    """(now, most so far) of this process, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(round(int(status[key].split()[0]) / 1024, 1) for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def at_once(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """What so many processes, one for each of `arguments`, put into the queue that is their last argument."""
    results: Any = multiprocessing.Queue()
    processes = [multiprocessing.Process(target=target, args=(*one, results)) for one in arguments]
    for process in processes:
        process.start()
    found = [results.get(timeout=1200) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return found


def read_at_random(uri: str, seed: int, result: Any) -> None:
    """One of the readers: gathers 2,000 passages at random, a few at a time."""
    from ckd_ray.store import EmbeddingStore

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    store, rng = EmbeddingStore.open(uri), np.random.default_rng(seed)
    for _ in range(100):
        asked = rng.integers(0, store.num_passages, 20)
        assert len(store.gather(asked).lengths) == 20
    result.put(memory()[1])


def many_shards(folder: Path, shards: int) -> dict[str, Any]:
    """Write, close, read."""
    import torch

    from ckd_ray.store import EmbeddingStore, shard_name, write_shard
    from ckd_ray.store.codec import Float16
    from ckd_ray.store.writing import close_store, intact_shards, summarise_shards

    rows = torch.nn.functional.normalize(torch.randn(10 * TOKENS, DIM), dim=1)
    lengths, ids, codec = np.full(10, TOKENS, np.int32), np.arange(10 * TOKENS, dtype=np.int32), Float16(DIM)
    started = time.monotonic()
    for i in range(shards):
        write_shard(
            str(folder / shard_name(i)), fingerprint="f", index=i, first=10 * i, lengths=lengths, token_ids=ids,
            embeddings_TD=rows, codec=codec,
        )  # fmt: skip
    written = time.monotonic()
    good, refused = intact_shards(str(folder), "f")
    assert len(good) == shards and not refused
    checked = time.monotonic()
    stocks = (summarise_shards(str(folder), "f", first, min(first + 64, shards)) for first in range(0, shards, 64))
    close_store(str(folder), "f", stocks)
    closed = time.monotonic()
    assert EmbeddingStore.open(str(folder)).num_passages == 10 * shards
    peaks = at_once(read_at_random, [(str(folder), n) for n in range(8)])
    return {
        "shards": shards,
        "write_seconds": round(written - started, 1),
        "check_seconds": round(checked - written, 1),
        "close_seconds": round(closed - checked, 1),
        "read_seconds": round(time.monotonic() - closed, 1),
        "readers": len(peaks),
        "files_a_reader": 256,
        "reader_peak_mib": max(peaks),
        "writer_peak_mib": memory()[1],
    }


def build_from(source: str, out: str, result: Any) -> None:
    """One of the builders: its passages, and its most memory in MiB."""
    from ckd_ray.checks import load_config
    from ckd_ray.data import Collection, build_collection
    from ckd_ray.progress import set_quiet

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    set_quiet(True)
    values = ["collection.format=parquet", f"collection.path={source}", "collection.limit=null"]
    build_collection(load_config(None, values).collection, out)
    result.put((Collection.open(out).num_passages, memory()[1]))


def many_files(folder: Path, files: int) -> dict[str, Any]:
    """Write, look at, build."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ckd_ray.checks import load_config
    from ckd_ray.data import source_signature

    source = folder / "source"
    (source / "passages.parquet").mkdir(parents=True)
    for i in range(files):
        rows = range(10 * i, 10 * i + 10)
        table = pa.table({"passage_id": [f"p{n}" for n in rows], "text": [f"what is said of number {n}" for n in rows]})
        pq.write_table(table, source / "passages.parquet" / f"part-{i:05d}.parquet")
    pq.write_table(pa.table({"query_id": ["q"], "text": ["which"]}), source / "queries.train.parquet")
    labels = {"query_id": ["q"], "passage_id": ["p7"], "relevance": [1]}
    pq.write_table(pa.table(labels), source / "qrels.train.parquet")
    values = ["collection.format=parquet", f"collection.path={source}"]
    started = time.monotonic()
    assert source_signature(load_config(None, values).collection).count("part-") == files
    looked = time.monotonic()
    found = at_once(build_from, [(str(source), str(folder / f"out-{n}")) for n in range(4)])
    assert {passages for passages, _ in found} == {10 * files}
    return {
        "files": files,
        "signature_seconds": round(looked - started, 2),
        "build_seconds": round(time.monotonic() - looked, 1),
        "builders": len(found),
        "files_a_builder": 256,
        "builder_peak_mib": max(peak for _, peak in found),
    }


class Watch:
    """The memory of this process (the driver), and of all that it has started together, looked at every two seconds."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(2.0):
            started = sum(_held(process.pid) for process in below(os.getpid()))
            self.seen.append((memory()[0], started))

    def figures(self) -> dict[str, float]:
        """The median of each tenth's end tells growth from what a start costs; and the most of all."""
        tenth = max(1, len(self.seen) // 10)
        found = {}
        for column, name in enumerate(("driver", "started")):
            values = [both[column] for both in self.seen]
            found[f"{name}_mib_second_tenth"] = round(float(np.median(values[tenth : 2 * tenth])), 1)
            found[f"{name}_mib_last_tenth"] = round(float(np.median(values[-tenth:])), 1)
            found[f"{name}_mib_most"] = round(max(values), 1)
        return found


def _held(pid: int) -> float:
    """Memory of a process that others do not share, in MiB; 0 when it has ended."""
    with suppress(OSError, StopIteration):
        pages = Path(f"/proc/{pid}/statm").read_text().split()
        return (int(pages[1]) - int(pages[2])) * resource.getpagesize() / 2**20
    return 0.0


def rank_by_chance(batch: dict[str, Any], rankings: str, passages: int, depth: int) -> Any:
    """A part of rankings: for each query `depth` passages, every seventh from one drawn by the part's number."""
    import pyarrow as pa

    from ckd_ray.ray_util.parts import part_file
    from ckd_ray.retrieve.rankings import write_ranking_part

    part, first, stop = (int(batch[name][0]) for name in ("part", "first", "stop"))
    top = (np.random.default_rng(part).integers(0, passages, (stop - first, 1)) + 7 * np.arange(depth)) % passages
    write_ranking_part(
        f"{rankings}/{part_file('train', part)}", first_query=first, query_ids=[f"q{i}" for i in range(first, stop)],
        scores_BK=np.zeros(top.shape, np.float32), passages_BK=top, passage_ids=[f"p{p}" for p in top.ravel()],
    )  # fmt: skip
    return pa.table({"part": [part], "queries": [stop - first]})


def labelled(folder: Path, queries: int, passages: int = 60, depth: int = 5) -> tuple[Path, dict[str, Any]]:
    """A run whose training split has so many queries, labelled by the stage itself, and the figures of that."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray

    from ckd_ray.config import LabelConfig
    from ckd_ray.labels.stage import CELLS, EstimatedVotes, LabelJob, find_special_cells, label
    from ckd_ray.ray_util.parts import query_spans, run_parts
    from ckd_ray.ray_util.session import _quiet_data
    from ckd_ray.retrieve.rankings import write_ranking_matrix
    from tests.evidence import hand_made_run
    from tests.support import tiny_bert, write_collection

    run = hand_made_run(
        folder / "runs", tiny_bert(folder / "encoder"), write_collection(folder / "collection", passages=passages)
    )
    path, block = run / "queries" / "train.parquet", 1 << 18
    schema = pa.schema([("query_id", pa.string()), ("text", pa.large_string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(0, queries, block):
            numbers = range(first, min(first + block, queries))
            texts = pa.array([f"who is asked for number {i}" for i in numbers], pa.large_string())
            writer.write_table(pa.table([pa.array([f"q{i}" for i in numbers]), texts], schema), row_group_size=4096)
    spans, rankings, labels = query_spans(queries), run / "rankings", run / "labels"
    rankings.mkdir()
    labels.mkdir()
    ray.init(address="local", num_cpus=2, object_store_memory=150 * 2**20, include_dashboard=False, log_to_driver=False)
    _quiet_data()
    drawn = {"rankings": str(rankings), "passages": passages, "depth": depth}
    ranked = sum(int(r["queries"]) for r in run_parts([*range(len(spans))], spans, rank_by_chance, drawn))
    assert ranked == queries
    write_ranking_matrix(str(rankings), "train", spans, depth)
    job = LabelJob(
        str(run), "train", str(run / "teacher"), str(run / "embeddings" / "passages"), str(rankings), str(labels),
        LabelConfig(clusters=8, neighbours="estimate"),
    )  # fmt: skip
    cells = find_special_cells(str(labels / CELLS), job, 17)
    started = time.monotonic()
    with Watch() as watch:
        per_part = label(job, EstimatedVotes(cells), queries)
    seconds = time.monotonic() - started
    ray.shutdown()
    (labels / "_manifest.json").write_text(json.dumps({"made_of": "hand", "queries_per_part": per_part}))
    return run, {
        "queries": queries,
        "parts": len(spans),
        "label_gib": round(sum(file.stat().st_size for file in labels.rglob("*.*")) / 2**30, 2),
        "seconds": round(seconds, 1),
        "queries_per_second": round(queries / seconds, 1),
        **watch.figures(),
    }


def many_queries(folder: Path, queries: int) -> dict[str, Any]:
    """Label a split of so many queries by the stage itself, and look at every part that it has written."""
    import pyarrow.parquet as pq

    from ckd_ray.ray_util.parts import part_file, query_spans

    run, figures = labelled(folder, queries)
    expansions = 0
    for part, (first, stop) in enumerate(query_spans(queries)):
        table = pq.read_table(run / "labels" / part_file("train", part), columns=["query_id", "feedback_ids", "idf"])
        assert table["query_id"].to_pylist() == [f"q{i}" for i in range(first, stop)]
        assert all(len(ids) == 3 for ids in table["feedback_ids"].to_pylist())
        expansions += sum(map(len, table["idf"].to_pylist()))
    return {**figures, "expansion_embeddings": expansions}


def many_exports(folder: Path, queries: int, width: int = 64) -> dict[str, Any]:
    """Export the labels of so many queries, and read the result as its users do."""
    import pyarrow.parquet as pq
    import ray
    import torch

    from ckd_ray.inspection.export_labels import export_labels
    from ckd_ray.store import shard_name, write_manifest, write_shard
    from ckd_ray.store.codec import Float16

    run, _ = labelled(folder, queries, passages=2000, depth=width)
    record = json.loads((run / "run.json").read_text())
    record["config"]["retrieve"]["depth"] = record["config"]["distill"]["negatives_depth"] = width
    (run / "run.json").write_text(json.dumps(record))
    store, rows, shard = run / "embeddings" / "queries.train", 12, 8192
    store.mkdir(parents=True)
    for index, first in enumerate(range(0, queries, shard)):
        count = min(shard, queries - first)
        generator = torch.Generator().manual_seed(index)
        drawn = torch.nn.functional.normalize(torch.randn(count * rows, DIM, generator=generator), dim=1)
        write_shard(
            str(store / shard_name(index)), fingerprint="hand", index=index, first=first,
            lengths=np.full(count, rows, np.int32), token_ids=np.zeros(count * rows, np.int32), embeddings_TD=drawn,
            codec=Float16(DIM),
        )  # fmt: skip
    write_manifest(str(store), "hand", -(-queries // shard))
    ray.init(address="local", num_cpus=2, object_store_memory=150 * 2**20, include_dashboard=False, log_to_driver=False)
    started, before = time.monotonic(), memory()[0]
    with Watch() as watch:
        told = export_labels(str(run), "sentence-transformers", width=width)
    seconds = time.monotonic() - started
    ray.shutdown()
    table = pq.ParquetFile(Path(told["out"]) / "train.parquet")
    assert told["queries"] == table.metadata.num_rows == queries, told
    for group in (0, table.num_row_groups - 1):
        assert all(len(scores) == width for scores in table.read_row_group(group)["scores"].to_pylist())
    return {
        "queries": queries,
        "candidates": width,
        "seconds": round(seconds, 1),
        "queries_per_second": round(queries / seconds, 1),
        "export_gib": round(sum(file.stat().st_size for file in Path(told["out"]).rglob("*.*")) / 2**30, 2),
        "driver_mib_before": before,
        **watch.figures(),
    }


def many_tasks(count: int) -> dict[str, Any]:
    """Parts of no work through Ray Data: what the driver holds."""
    import ray

    from ckd_ray.ray_util.parts import query_spans, run_parts
    from ckd_ray.ray_util.session import _quiet_data

    ray.init(address="local", num_cpus=2, object_store_memory=150 * 2**20, include_dashboard=False, log_to_driver=False)
    _quiet_data()
    spans, before, started = query_spans(256 * count), memory()[0], time.monotonic()
    done = sum(int(row["queries"]) for row in run_parts(list(range(count)), spans, nothing, {}))
    assert done == 256 * count
    found = {"parts": count, "seconds": round(time.monotonic() - started, 1), "driver_mib_before": before}
    found |= {"driver_peak_mib": memory()[1]}
    ray.shutdown()
    return found


def nothing(batch: dict[str, Any]) -> Any:
    """The work of a part, left out."""
    import pyarrow as pa

    return pa.table({"part": [int(batch["part"][0])], "queries": [int(batch["stop"][0]) - int(batch["first"][0])]})


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=0)
    parser.add_argument("--shards", type=int, default=0)
    parser.add_argument("--queries", type=int, default=0)
    parser.add_argument("--export", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=0)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.files:
            found["many_files"] = many_files(Path(scratch), arguments.files)
        if arguments.shards:
            (Path(scratch) / "store").mkdir()
            found["many_shards"] = many_shards(Path(scratch) / "store", arguments.shards)
        if arguments.queries:
            found["many_queries"] = many_queries(Path(scratch), arguments.queries)
        if arguments.export:
            found["many_exports"] = many_exports(Path(scratch), arguments.export)
        if arguments.tasks:
            found["many_tasks"] = many_tasks(arguments.tasks)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
