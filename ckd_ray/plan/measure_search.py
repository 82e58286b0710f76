"""Rates of everything that follows the encoder: exact search, IVF-PQ, inverted lists, labels, measures.

Measured on the few hundred passages of the calibration's store, by the functions of the stages. Rates are those of a
core: the seconds of all cores together, times their number.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

from ckd_ray.collective.special_cells import SpecialCells
from ckd_ray.config import Config
from ckd_ray.data import Collection
from ckd_ray.evaluate.measures import measure_parts
from ckd_ray.evaluate.runs import falling_scores, write_trec_run
from ckd_ray.files import write_json_atomic
from ckd_ray.labels.feedback import expand_depths
from ckd_ray.labels.files import manifest_of_labels, write_labels
from ckd_ray.model import ColBERT
from ckd_ray.ray_util.parts import part_file
from ckd_ray.retrieve.centroids import CentroidIndex, probe
from ckd_ray.retrieve.exact import Scorer, nearest_rows, search_all
from ckd_ray.retrieve.faiss_index import candidate_passages, choose_subquantizers
from ckd_ray.retrieve.merge import merge_top
from ckd_ray.retrieve.rankings import read_ranking_part, write_ranking_matrix, write_ranking_part
from ckd_ray.retrieve.rows import FlatRows, ShardRows
from ckd_ray.runs.directory import RunDir
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.codec import Residual

_BATCH = 256  # queries a part, as in retrieve/stream.py
_CELLS = 4096
_QUANTISED = 1 << 15
_ROWS = (1 << 14, 1 << 16)


def seconds(call: Callable[[], Any], rounds: int = 1) -> float:
    """The median of some calls, after one that warms up."""
    call()
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return float(np.median(found))


def search_rates(
    run: str,
    config: Config,
    model: ColBERT,
    store: EmbeddingStore,
    queries: EmbeddingStore,
    cores: int,
    device: torch.device,
) -> dict[str, float]:
    """All rates of retrieval, labels and evaluation; writes rankings and labels of the training queries into `run`."""
    rows = ShardRows([store.shard(0)], store.dim)
    count = queries.num_passages
    asked = queries.gather(np.arange(count)).embeddings_TD.float().reshape(count, -1, store.dim)
    batch = asked[torch.arange(_BATCH) % count]
    found = _exact(batch, rows, cores, device)
    found |= _neighbours(batch, rows, cores) | _faiss(config, batch, rows, cores) | _lists(batch, rows, cores)
    ranked = search_all(Scorer(asked, rows, device), min(config.retrieve.depth, store.num_passages))
    found |= _ranking(run, ranked)
    found |= _labels(run, config, model, store, np.asarray(ranked[1]))
    found |= _evaluation(config)
    return found


def _exact(batch: torch.Tensor, rows: ShardRows, cores: int, device: torch.device) -> dict[str, float]:
    """Products of all passages with a batch, and of chosen pairs: many queries a passage, and one."""
    scorer = Scorer(batch, rows, device)
    devices = 1 if device.type == "cuda" else cores
    passages = rows.num_passages
    each = 2.0 * scorer.query_rows * scorer.dim  # operations a passage row and query
    dense = each * rows.num_rows * len(batch)
    found = {"dense_ops": dense / seconds(lambda: scorer.dense(np.arange(passages)), 2) / devices}
    some = np.random.default_rng(0)
    many = (np.repeat(np.arange(len(batch)), 64), some.integers(0, passages, 64 * len(batch)))
    one = (np.sort(some.integers(0, len(batch), 2 * passages)), some.permutation(2 * passages) % passages)
    for name, (query, passage) in (("pair", many), ("single", one)):
        work = each * float(rows.lengths[passage].sum())
        for suffix, exact in (("ops", False), ("exact_ops", True)):
            taken = seconds(partial(scorer.pairs, query, passage, exact=exact), 2)
            found[f"{name}_{suffix}"] = work / taken / devices
    entries = (np.sort(-some.random((len(batch), 100))).astype(np.float32), some.integers(0, 10**6, (len(batch), 100)))
    return found | {"merge_entry_s": seconds(lambda: merge_top([entries, entries], 100), 3) / (len(batch) * 100)}


def _neighbours(batch: torch.Tensor, rows: ShardRows, cores: int) -> dict[str, float]:
    """Nearest token embeddings of centroids, exact: what a vector costs, and what a row more costs; and nearest
    centroids in float64."""
    vectors = batch.reshape(-1, batch.shape[2])[:1024].contiguous()
    dim, taken = vectors.shape[1], []
    for count in _ROWS:
        # The same rows over and over: the stage looks at many blocks of them, whatever they hold.
        many = FlatRows(rows.take(np.arange(count) % rows.num_rows), np.ones(count, np.int64))
        taken.append(seconds(partial(nearest_rows, vectors, many, 10)) * cores)
    row = max(1e-15, (taken[1] - taken[0]) / (len(vectors) * (_ROWS[1] - _ROWS[0])))
    each = max(1e-9, taken[0] / len(vectors) - row * _ROWS[0])
    centroids = rows.take(np.arange(min(_CELLS, rows.num_rows))).half()
    probing = 2.0 * vectors.numel() * len(centroids)
    return {
        "nearest_ops": 2.0 * dim / row,
        "nearest_vector_s": each,
        "probe_ops": probing / seconds(lambda: probe(vectors, centroids, 33), 2) / cores,
    }


def _faiss(config: Config, batch: torch.Tensor, rows: ShardRows, cores: int) -> dict[str, float]:
    """IVF-PQ: nearest cells, training the quantiser, coding, and a search that looks into few and into many cells.

    Two indexes: many short lists tell what a cell costs (its table of distances is read from memory, as in a large
    index), few long ones what a code costs.
    """
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    dim = batch.shape[2]
    points = rows.take(np.arange(_QUANTISED) % rows.num_rows).float().numpy()
    cells = faiss.IndexFlatL2(dim)
    cells.add(points[:_CELLS])
    some = points[:8192]
    assign = 2.0 * some.size * cells.ntotal / seconds(lambda: cells.search(some, 1)) / cores
    short = _ivf(points, rows.num_rows, min(_CELLS, rows.num_rows // 4))
    long = _ivf(points, rows.num_rows, rows.num_rows // 1024)
    fresh = faiss.ProductQuantizer(dim, short.pq.M, short.pq.nbits)
    fresh.cp.min_points_per_centroid = 1
    started = time.perf_counter()
    fresh.train(points)
    # faiss trains on at most 256 points a centroid, in time that grows with them.
    training = (time.perf_counter() - started) * cores * 65536 / len(points)
    coding = seconds(lambda: fresh.compute_codes(some)) * cores / len(some)
    vectors = batch.reshape(-1, dim)
    flat = vectors[torch.arange(512) % len(vectors)].contiguous().numpy()
    wanted = min(config.retrieve.candidates, rows.num_rows)

    def row(index: Any, probes: int) -> tuple[int, float]:
        """(cells looked into, core seconds a vector)."""
        index.nprobe = max(1, min(probes, index.nlist))
        return index.nprobe, seconds(lambda: index.search(flat, wanted)) * cores / len(flat)

    (few, least), (many, most) = row(short, 8), row(short, 64)
    probe_s = max(1e-9, (most - least) / max(1, many - few))
    (one, low), (all_, high) = row(long, long.nlist // 4), row(long, long.nlist)
    codes = (all_ - one) * rows.num_rows / long.nlist
    code_s = max(1e-11, (high - low - (all_ - one) * probe_s) / max(1.0, codes))
    # Of the long lists, since only there the heap of the nearest is full, which most of a row's own time goes into.
    row_s = low - one * (probe_s + rows.num_rows / long.nlist * code_s) - long.nlist * 2 * dim / assign
    distances, positions = long.search(batch[0].contiguous().numpy(), wanted)
    passage_of = np.repeat(np.arange(rows.num_passages, dtype=np.int32), rows.lengths)
    return {
        "assign_ops": assign,
        "pq_train_s": max(1e-6, training),
        "add_token_s": coding,
        "ivf_code_s": code_s,
        "ivf_probe_s": probe_s,
        "ivf_row_s": max(1e-9, row_s),
        "promising_query_s": seconds(lambda: candidate_passages(distances, positions, passage_of, 1024), 3),
    }


def _ivf(points: Any, count: int, cells: int) -> Any:
    """An IVF-PQ index over `count` rows with so many cells, whose centres are rows, not means: quick, and as fast."""
    import faiss

    dim, cells = points.shape[1], max(1, cells)
    quantizer = faiss.IndexFlatL2(dim)
    quantizer.add(points[:cells])
    bits = 8 if count >= 4096 else 4
    index = faiss.IndexIVFPQ(quantizer, dim, cells, choose_subquantizers(dim), bits)
    index.own_fields = True  # the quantiser lives as long as the index
    cast(Any, quantizer).this.disown()
    index.pq.cp.min_points_per_centroid = index.cp.min_points_per_centroid = 1
    index.train(points[: min(count, 8192)])
    index.add(points[:count] if count <= len(points) else points)
    return index


def _lists(batch: torch.Tensor, rows: ShardRows, cores: int) -> dict[str, float]:
    """Inverted lists of a residual codec, whose centroids are some of the rows here: only the times are wanted."""
    dim = batch.shape[2]
    if dim % 4:
        return {"list_entry_s": 1e-9, "list_passage_s": 1e-9, "decode_token_s": 1e-9}  # no such codec
    centroids = rows.take(np.arange(0, rows.num_rows, max(1, rows.num_rows // 512)))
    codec = Residual("residual2", centroids, torch.tensor([-0.05, 0.0, 0.05]), torch.tensor([-0.1, -0.02, 0.02, 0.1]))
    codes = codec.encode(rows.take(np.arange(rows.num_rows)))
    index = CentroidIndex(_Coded(rows, codec, codes), codec, min(64, codec.num_centroids - 1))  # type: ignore[arg-type]
    decode = seconds(lambda: codec.decode(codes), 2) * cores / len(codes)
    some = batch[:32]
    ids, similarity = index.probes(some)
    entries = float(np.diff(index.bounds)[ids[:, :, :-1]].sum())
    entry = seconds(lambda: index.candidates(ids, similarity, 64), 2) / max(1.0, entries)
    numbers = np.zeros(1 << 20, np.float32)

    def reset() -> None:
        numbers[:] = 0
        np.flatnonzero(numbers)

    return {"list_entry_s": entry, "list_passage_s": seconds(reset, 3) / len(numbers), "decode_token_s": decode}


class _Coded:
    """Rows of the store in another codec, as `CentroidIndex` asks for them."""

    def __init__(self, rows: ShardRows, codec: Residual, codes: Any) -> None:
        self.first, self.lengths, self.offsets = rows.first, rows.lengths, rows.offsets
        self.num_passages, self.num_rows = rows.num_passages, rows.num_rows
        self._ids = codec.centroid_ids(codes)

    def centroid_ids(self) -> Any:
        """See `ShardRows`."""
        yield self._ids


def _ranking(run: str, ranked: tuple[Any, Any]) -> dict[str, float]:
    """Write the rankings of the sample's training queries, and time a part of 256 queries as the stage writes it."""
    collection = Collection.open(run)
    ids, folder = collection.queries("train").ids, Path(RunDir(run).rankings)
    scores, passages = (np.asarray(x) for x in ranked)

    def write(where: Path, count: int) -> None:
        where.mkdir(exist_ok=True)
        rows = np.arange(count) % len(ids)
        found = passages[rows]
        write_ranking_part(
            f"{where}/{part_file('train', 0)}",
            first_query=0,
            query_ids=[ids[i] for i in rows],
            scores_BK=scores[rows],
            passages_BK=found,
            passage_ids=collection.passage_ids(found[found >= 0]),
        )
        write_ranking_matrix(str(where), "train", [(0, count)], found.shape[1])

    write(folder, len(ids))
    part = Path(run) / "rankings-part"
    return {"rank_row_s": seconds(lambda: write(part, _BATCH), 2) / (_BATCH * passages.shape[1])}


def _labels(run: str, config: Config, model: ColBERT, store: EmbeddingStore, ranked: Any) -> dict[str, float]:
    """Expansions by the feedback's own votes, with the label files, in one thread as in the stage's tasks."""
    settings, silent = config.label, model.tokenizer.hf.all_special_ids
    feedback = np.full((len(ranked), settings.depths[-1]), -1, np.int64)
    feedback[:, : min(ranked.shape[1], feedback.shape[1])] = ranked[:, : feedback.shape[1]]
    ids = Collection.open(run).queries("train").ids
    rows = np.arange(_BATCH) % len(ids)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:

        def label(name: str, chosen: Any) -> Any:
            folder = Path(run) / name
            folder.mkdir(exist_ok=True)
            found = expand_depths(store, feedback[chosen], settings, neighbours=None, special_token_ids=silent)
            write_labels(
                str(folder),
                "train",
                0,
                query_ids=[ids[i] for i in chosen],
                feedback_ids=[[] for _ in chosen],
                expansions=found,
                clusters=settings.clusters,
            )
            return torch.cat([expansions.embeddings_BKD.flatten(0, 1) for expansions in found.values()])

        centroids = label("labels", np.arange(len(ids)))
        each = seconds(lambda: label("labels-part", rows), 2) / len(rows)
        cells = centroids[torch.arange(_CELLS) % len(centroids)]
        cells = torch.nn.functional.normalize(cells + 0.1 * torch.randn(cells.shape), dim=1)
        crowded = SpecialCells(cells[: _CELLS // 50], cells[_CELLS // 50 :])
        asking = seconds(lambda: crowded.in_special_cell(centroids), 1) / len(ids)
    finally:
        torch.set_num_threads(before)
    write_json_atomic(f"{run}/labels/manifest.json", manifest_of_labels(max(1, len(ids)), "train", settings.depths))
    return {"expand_query_s": each, "crowded_query_s": asking}


def _evaluation(config: Config) -> dict[str, float]:
    """A part of a made-up ranking through everything that the driver does with it."""
    depth, queries = config.evaluate.depth, max(4, min(64, 64_000 // config.evaluate.depth))
    rows = queries * depth
    with tempfile.TemporaryDirectory() as folder:
        names = [f"q{i}" for i in range(queries)]
        scores = np.sort(np.random.default_rng(0).random((queries, depth)).astype(np.float32))[:, ::-1].copy()
        passages = np.tile(np.arange(depth), (queries, 1))
        uri = f"{folder}/part.parquet"
        write_ranking_part(
            uri, first_query=0, query_ids=names, scores_BK=scores, passages_BK=passages,
            passage_ids=[f"passage-{i}" for i in passages.ravel()],
        )  # fmt: skip
        qrels = pd.DataFrame({"query_id": names, "doc_id": ["passage-3"] * queries, "relevance": 1})

        def read() -> pd.DataFrame:
            table = read_ranking_part(uri, ["query_id", "passage_id", "rank", "score"])
            return falling_scores(table.to_pandas().rename(columns={"passage_id": "doc_id"}))

        def evaluate() -> None:
            write_trec_run(f"{folder}/run", (read() for _ in range(1)), "plan")
            threshold = config.evaluate.relevance_threshold
            measure_parts(((read(), qrels) for _ in range(1)), config.evaluate.measures, threshold)

        return {"evaluate_row_s": seconds(evaluate) / rows}
