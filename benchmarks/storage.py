"""What object storage costs a training: requests and seconds a step and a passage, against the same run on a disk.

    python benchmarks/storage.py [--run RUN] [--latency 20] [--quick]

A run that has its labels is copied to an S3 server of this machine (moto, a process of its own), which counts requests
and lets each wait for `--latency` milliseconds before it answers. Then the training loop of a worker runs on both, 9
queries a step: on the disk; from the server with an empty cache; and from the server once more, in a new reader, with
the cache that the first one has filled. Last, all passages are read in order, texts and embeddings, as a stage reads
them. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
from common import arguments, emit, figure, machine, note
from distill_run import DistillRun, distill_run, median, timed_steps

from ckd_ray.data import Collection
from ckd_ray.distill.task import TrainingTask
from ckd_ray.files import copy_folder, join, make_folder
from ckd_ray.files.cache import FOLDER_VARIABLE
from ckd_ray.store import EmbeddingStore

FOLDERS = ("corpus", "queries", "teacher", "embeddings", "rankings", "labels", "ensemble")  # what a training reads
QUERIES_A_STEP = 9  # of 36 on 4 workers, as in configs/msmarco.yaml


def main() -> None:
    latency = {"type": float, "default": 20.0, "metavar": "MS", "help": "before every answer (20)"}
    args = arguments(__doc__ or "", run={"metavar": "RUN", "help": "a run that has its labels"}, latency=latency)
    before = machine()
    run = distill_run(args)
    note("copying the run to a server")
    with tempfile.TemporaryDirectory() as cache:
        os.environ[FOLDER_VARIABLE] = cache
        with Server() as server:
            remote = join(server.uri, "run")
            for name in FOLDERS:
                if (run.folder / name).is_dir():
                    copy_folder(str(run.folder / name), join(remote, name))
            server.wait(args.latency / 1000)
            figures, settings = measure(run, remote, server, args)
    emit({"latency_ms": args.latency, "queries_a_step": QUERIES_A_STEP, **settings}, figures, before)


def measure(
    run: DistillRun, remote: str, server: Server, args: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The figures, and what they were computed from."""
    task = run.task("collective", QUERIES_A_STEP)
    count = 8 if args.quick else 24
    disk, _ = steps(run, task, count, server)
    cold, cold_requests = steps(run, replace(task, run=remote), count, server)
    warm, warm_requests = steps(run, replace(task, run=remote), count, server)
    passages, seconds, requests = in_order(remote, server)
    _, disk_seconds, _ = in_order(str(run.folder), server)
    figures = {
        "requests_a_step_warm": figure(warm_requests, 2, "lower"),
        "warm_step_over_disk": figure(warm / disk, 1.2, "lower"),
        "requests_a_step_cold": figure(cold_requests, None, "lower"),
        "cold_step_over_disk": figure(cold / disk, None, "lower"),
        "requests_a_1000_passages": figure(1000 * requests / passages, None, "lower"),
    }
    settings = {
        "steps": count,
        "seconds_a_step": {"disk": round(disk, 4), "cold": round(cold, 4), "warm": round(warm, 4)},
        "passages": passages,
        "milliseconds_a_passage": {
            "disk": round(1e3 * disk_seconds / passages, 4),
            "server": round(1e3 * seconds / passages, 4),
        },
    }
    return figures, settings


def steps(run: DistillRun, task: TrainingTask, count: int, server: Server) -> tuple[float, float]:
    """(seconds, requests) a step. Seconds are the median, without the first step; requests are the mean, without what
    a reader asks for when it opens the run."""
    note(f"{count} steps on {task.run.split('?')[0]}")
    timed = timed_steps(task, 1, run.model())
    seconds = [next(timed)]  # the run is open
    asked = server.requests()
    seconds += [next(timed) for _ in range(count)]
    asked = server.requests() - asked
    timed.close()  # type: ignore[attr-defined]
    return median(seconds[1:]), asked / count


def in_order(root: str, server: Server) -> tuple[int, float, int]:
    """(passages, seconds, requests) of reading all texts and embeddings, from a new cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ[FOLDER_VARIABLE] = cache
        started, asked = time.perf_counter(), server.requests()
        collection = Collection.open(root)
        store = EmbeddingStore.open(join(root, "embeddings", "passages"))
        for first, texts in collection.text_blocks():
            store.gather(np.arange(first, first + len(texts)))
        return collection.num_passages, time.perf_counter() - started, server.requests() - asked


class Server:
    """An S3 server in a process of its own."""

    def __enter__(self) -> Server:
        context = get_context("spawn")
        self._latency, self._count = context.Value("d", 0.0), context.Value("q", 0)
        port = context.Queue()
        self._process = context.Process(target=_serve, args=(port, self._latency, self._count), daemon=True)
        self._process.start()
        options = f"scheme=http&endpoint_override=127.0.0.1:{port.get(timeout=120)}&allow_bucket_creation=true"
        self.uri = f"s3://key:secret@benchmark/runs?{options}"
        make_folder(self.uri)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.join()

    def wait(self, seconds: float) -> None:
        """Let every request wait so long from now on."""
        self._latency.value = seconds

    def requests(self) -> int:
        """How many have come so far."""
        return int(self._count.value)


def _serve(port: Any, latency: Any, count: Any) -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    inner = DomainDispatcherApplication(create_backend_app)

    def app(environ: Any, start_response: Any) -> Any:
        with count.get_lock():
            count.value += 1
        time.sleep(latency.value)
        return inner(environ, start_response)

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    port.put(server.port)
    server.serve_forever()


if __name__ == "__main__":
    main()
