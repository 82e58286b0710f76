"""Time of searching a store and of the collection's votes, by engine. Arithmetic alone; letters as in estimate.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckd_ray.config import Config
from ckd_ray.plan.rates import Rates
from ckd_ray.plan.sizes import Sizes
from ckd_ray.retrieve.faiss_index import choose_cells
from ckd_ray.store.codec import bytes_per_token
from ckd_ray.store.codec_training import choose_centroids

if TYPE_CHECKING:
    from ckd_ray.plan.estimate import Layout

_BATCH = 256  # queries a part (retrieve/stream.py)
# Of shard_range.py: candidates of faiss that are scored exactly.
_RERANK_FACTOR, _LEAST_RERANKED = 16, 1024
_IVF_ITERATIONS, _TRAINING_POINTS_A_CELL, _MOST_TRAINING_POINTS = 10, 64, 2_000_000
# Of special_cells.py.
_CELL_SAMPLE, _MOST_CELLS, _CELL_ITERATIONS, _POINTS_A_CELL = 500_000, 4096, 4, 32


@dataclass(frozen=True)
class Part:
    """Some seconds of a stage. waits: what would have to be faster; scales: it shrinks with more machines."""

    name: str
    seconds: float
    waits: str
    scales: bool = False


@dataclass(frozen=True)
class Servers:
    """The servers of a store: engine, how many, CPU threads, GPUs and index bytes of each."""

    engine: str
    count: int
    threads: int
    gpus: float = 0.0
    index_bytes: float = 0.0


def lanes(servers: Servers, rates: Rates, layout: Layout) -> float:
    """Devices that score at a time: GPUs where servers have them, else cores."""
    if servers.gpus and rates.device == "cuda":
        return max(servers.gpus * servers.count, 1e-9)
    return min(layout.cpus, float(servers.count * servers.threads))


def search_parts(
    config: Config, sizes: Sizes, rates: Rates, layout: Layout, servers: Servers, count: int, depth: int
) -> list[Part]:
    """Search for `count` queries.

    Every server checks its shards first. `exact`: 2 q Q V D operations, then each server scores the best K of its range
    again in float64, which does not shrink with their number. `faiss`: `_ivf`; `centroids`: `_centroids`. Then top
    lists are merged in tasks, and rows written.
    """
    if not count:
        return []
    m, codec = config.model, config.embed.codec
    stored = sizes.vectors * bytes_per_token(codec, m.dim)
    cores = min(layout.cpus, float(servers.count * servers.threads))
    parts = [Part("check the shards", stored * rates.write_byte_s / cores, "cores", scales=True)]
    if layout.remote:
        seconds = stored / (layout.network_bytes * min(layout.nodes, servers.count))
        parts.append(Part("fetch the shards", seconds, "network", scales=True))
    pair = sizes.kept * 2 * m.query_maxlen * m.dim  # operations of one query and passage
    if servers.engine == "exact":
        work = count * sizes.passages * pair / rates.dense_ops / lanes(servers, rates, layout)
        if codec != "fp16":  # decoded once a batch of queries
            work += -(-count // _BATCH) * sizes.vectors * rates.decode_token_s / cores
        parts.append(Part("score all passages", work, "exact search", scales=True))
    elif servers.engine == "faiss":
        parts += _ivf(config, sizes, rates, layout, servers, count, depth)
    else:
        parts += _centroids(config, sizes, rates, layout, servers, count, depth)
    each = sizes.passages / servers.count
    best = count * min(float(depth), each) * pair
    ops = _pair_ops(rates, depth * _BATCH / max(1.0, each), exact=True)
    # Engine `centroids` scores candidates of the whole store, of which a server holds its share.
    share = servers.count if servers.engine == "centroids" else 1
    one = lanes(servers, rates, layout) / servers.count
    parts.append(Part("exact scores of the best", best / ops / one / share, "exact search"))
    merged = count * depth * max(0, servers.count - 1) * rates.merge_entry_s / layout.cpus
    return [
        *parts,
        Part("merge the lists", merged, "cores", scales=True),
        Part("write rankings", count * depth * rates.rank_row_s, "driver"),
    ]


def _pair_ops(rates: Rates, queries_a_passage: float, *, exact: bool) -> float:
    """On a CPU, a passage that three queries or more of a batch ask for is one product."""
    if queries_a_passage >= 3 and rates.device == "cpu":
        return rates.pair_exact_ops if exact else rates.pair_ops
    return rates.single_exact_ops if exact else rates.single_ops


def cells(config: Config, sizes: Sizes) -> int:
    """Inverted lists of faiss."""
    chosen, count = config.retrieve.cells, int(sizes.vectors)
    return choose_cells(count) if chosen == "auto" else max(1, min(chosen, count // 39))


def build_ivf(config: Config, sizes: Sizes, rates: Rates, cores: float) -> list[Part]:
    """10 rounds of k-means over min(64 C, 2 million) rows for C cells, then each row to its cell, coded: one server."""
    count, dim = cells(config, sizes), config.model.dim
    trained = min(sizes.vectors, max(10_000, count * _TRAINING_POINTS_A_CELL), _MOST_TRAINING_POINTS)
    assign = (_IVF_ITERATIONS * trained + sizes.vectors) * count * 2 * dim / rates.assign_ops
    coded = sizes.vectors * rates.add_token_s + rates.pq_train_s
    return [Part("build the index", (assign + coded) / cores, "one server")]


def _ivf_rows(config: Config, sizes: Sizes, rates: Rates, rows: float, cores: float) -> float:
    """Seconds of `rows` vectors: C cells are compared, nprobe looked into, nprobe V / C codes read."""
    count, dim = cells(config, sizes), config.model.dim
    probes = min(config.retrieve.nprobe, count)
    inside = probes * (rates.ivf_probe_s + sizes.vectors / count * rates.ivf_code_s)
    each = rates.ivf_row_s + count * 2 * dim / rates.assign_ops + inside
    return rows * each / cores


def _ivf(
    config: Config, sizes: Sizes, rates: Rates, layout: Layout, servers: Servers, count: int, depth: int
) -> list[Part]:
    """Build; q Q rows through the index; candidates chosen one query at a time; at most 16 K of them scored."""
    cores, m = float(servers.threads), config.model
    chosen = min(float(sizes.passages), max(_LEAST_RERANKED, _RERANK_FACTOR * depth))
    work = count * chosen * sizes.kept * 2 * m.query_maxlen * m.dim
    ops = _pair_ops(rates, chosen * _BATCH / sizes.passages, exact=False)
    score = work / ops / lanes(servers, rates, layout)
    if config.embed.codec != "fp16":
        score += count * chosen * sizes.kept * rates.decode_token_s / cores
    return [
        *build_ivf(config, sizes, rates, cores),
        Part("look into the cells", _ivf_rows(config, sizes, rates, count * m.query_maxlen, cores), "one server"),
        Part("choose candidates", count * rates.promising_query_s, "one server"),
        Part("score candidates", score, "one server"),
    ]


def _centroids(
    config: Config, sizes: Sizes, rates: Rates, layout: Layout, servers: Servers, count: int, depth: int
) -> list[Part]:
    """q Q K' float64 products for K' centroids; nprobe V / K' list entries a row and N passages a query, in one thread
    a server; then `candidates` passages a query scored, wherever they lie."""
    m, r = config.model, config.retrieve
    known = choose_centroids(int(sizes.vectors))
    cores = min(layout.cpus, float(servers.count * servers.threads))
    probing = count * m.query_maxlen * known * 2 * m.dim / rates.probe_ops / cores
    entries = count * m.query_maxlen * min(r.nprobe, known) * sizes.vectors / known * rates.list_entry_s
    reset = count * sizes.passages * rates.list_passage_s
    chosen = min(float(sizes.passages), max(depth, r.candidates))
    ops = _pair_ops(rates, chosen * _BATCH / sizes.passages, exact=False)
    work = count * chosen * sizes.kept * 2 * m.query_maxlen * m.dim / ops / lanes(servers, rates, layout)
    work += count * chosen * sizes.kept * rates.decode_token_s / cores
    return [
        Part("look at centroids", probing, "cores", scales=True),
        Part("read the lists", (entries + reset) / min(layout.cpus, servers.count), "cores", scales=True),
        Part("score candidates", work, "exact search", scales=True),
    ]


def vote_parts(config: Config, sizes: Sizes, rates: Rates, layout: Layout, count: int) -> list[Part]:
    """Votes of the collection for q * clusters centroids of each depth (method.md, step 4).

    `exact`: 2 q clusters V D operations on the servers' CPUs, and `nearest_vector_s` a centroid in each. `faiss`: an
    index of their own, and its search.
    `estimate`: once, k-means over at most 500,000 rows on one machine. `feedback`: nothing more.
    """
    vectors = count * config.label.clusters * len(config.label.depths)
    if layout.votes == "exact":
        assert layout.vote is not None
        cores = min(layout.cpus, float(layout.vote.count * layout.vote.threads))
        work = vectors * sizes.vectors * 2 * config.model.dim / rates.nearest_ops / cores
        # Every server makes sure of the nearest of its range.
        work += vectors * rates.nearest_vector_s * layout.vote.count / cores
        return [Part("exact votes of the collection", work, "cores", scales=True)]
    if layout.votes == "faiss":
        assert layout.vote is not None
        cores = float(layout.vote.threads)
        found = _ivf_rows(config, sizes, rates, vectors, cores)
        return [*build_ivf(config, sizes, rates, cores), Part("votes by the index", found, "one server")]
    if layout.votes == "estimate":
        sample = min(float(_CELL_SAMPLE), sizes.vectors)
        known = min(float(_MOST_CELLS), max(1.0, sample / 64))
        rounds = _CELL_ITERATIONS * min(sample, known * _POINTS_A_CELL) + sample
        work = rounds * known * 2 * config.model.dim / (rates.assign_ops * layout.node_cpus)
        return [Part("find the special tokens' cells", work, "one machine")]
    return []
