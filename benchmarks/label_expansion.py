"""Expansion of queries in batches against the published step a query at a time, and who may vote for the tokens.

expand_vs_literal: queries/s of `expand_ranked` (store reads, k-means, votes of the default approximate way, selection)
over those of `label_literal` (k-means, one IVF-PQ call, dictionaries; its feedback is in memory already). Both have all
cores: ours as the stage has them, a process a core and 256 queries at a time, the literal version through the threads
of scikit-learn and faiss. The index and the cells are built before, both untimed; `settings` says how long they took.
vote_agreement: share of the centroids for which the default approximate way elects the token that the exact 10 nearest
neighbours elect.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import alternate, figure, note
from label_literal import clustering, literal_expansion
from torch import Tensor

from ckd_ray.collective.expand import Expansions
from ckd_ray.collective.special_cells import SpecialCells
from ckd_ray.config import LabelConfig
from ckd_ray.labels.feedback import expand_ranked
from ckd_ray.model.colbert import load_tokenizer
from ckd_ray.retrieve.exact import Scorer, search_all
from ckd_ray.retrieve.faiss_index import TokenIndex
from ckd_ray.retrieve.nearest import nearest_rows
from ckd_ray.retrieve.rankings import read_ranking_matrix
from ckd_ray.retrieve.rows import FlatRows
from ckd_ray.store import EmbeddingStore

Int64Array = npt.NDArray[np.int64]

_PART = 256  # queries of a task of the label stage


@dataclass
class Bench:
    """The store in memory, the feedback of some queries, and both ways to find voters."""

    run: Any
    feedback_BF: Int64Array
    rows: FlatRows
    token_ids_T: npt.NDArray[np.int32]
    silent: npt.NDArray[np.integer]
    settings: LabelConfig

    @classmethod
    def of(cls, run: Any, queries: int) -> Bench:
        """`queries` evenly spaced training queries; their feedback is that of the run's rankings if there are any."""
        store = run.passages
        shards = [store.shard(i) for i in range(store.num_shards)]
        rows_TD = torch.cat([s.embeddings() for s in shards])
        token_ids_T = np.concatenate([s.token_ids for s in shards])
        asked = run.queries("train")
        chosen = np.linspace(0, asked.num_passages - 1, min(queries, asked.num_passages)).astype(np.int64)
        settings = LabelConfig()
        if (run.folder / "rankings" / "_rows" / "train.npy").exists():
            top = read_ranking_matrix(str(run.folder / "rankings"), "train")[chosen][:, : settings.feedback_passages]
        else:
            note(f"exact search for {len(chosen)} queries")
            queries_BQD = asked.gather(chosen).embeddings_TD.float().view(len(chosen), -1, store.dim)
            scorer = Scorer(queries_BQD, FlatRows(rows_TD, store.lengths()))
            top = search_all(scorer, settings.feedback_passages)[1]
        silent = load_tokenizer(str(run.folder / "teacher")).special_token_ids
        return cls(run, np.asarray(top, np.int64), FlatRows(rows_TD, store.lengths()), token_ids_T, silent, settings)

    @cached_property
    def store(self) -> EmbeddingStore:
        """Of the passages."""
        return self.run.passages

    def expand(self, cells: Any, feedback_BF: Int64Array) -> Expansions:
        """The label step for all these queries, votes by the default estimate."""

        return expand_ranked(
            self.store,
            feedback_BF,
            self.settings,
            neighbours=None,
            special_token_ids=self.silent,
            in_special_cell=cells.in_special_cell,
        )


def figures(run: Any, quick: bool, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """See the top of this module."""
    note("expansion: reading the store")
    bench = Bench.of(run, 512 if quick else 2048)
    started = time.perf_counter()
    index = TokenIndex(bench.rows)
    settings["ivfpq_index_seconds"] = round(time.perf_counter() - started, 1)
    started = time.perf_counter()
    cells = SpecialCells.of_store(run.passages, bench.silent, seed=17)
    settings["special_cells_seconds"] = round(time.perf_counter() - started, 1)
    settings["special_cells"] = [len(cells.special_XD), len(cells.other_YD)]
    found = _rates(bench, cells, index, 24 if quick else 128, settings)
    return found | _agreement(bench, cells, index, 32 if quick else 128)


def _rates(bench: Bench, cells: Any, index: Any, literal_queries: int, settings: dict[str, Any]) -> dict[str, Any]:
    note("expansion: rates")
    store = bench.run.passages
    few = bench.feedback_BF[:: max(1, len(bench.feedback_BF) // literal_queries)][:literal_queries]
    passages = [[p.float().numpy() for p in store.gather(top[top >= 0]).split()] for top in few]
    silent, df = set(bench.silent.tolist()), store.document_frequencies
    settings |= {"literal_kmeans": clustering(), "literal_queries": len(few), "batch": len(bench.feedback_BF)}

    def literal() -> None:
        for query in passages:
            literal_expansion(query, index.index, bench.token_ids_T, silent, df, store.num_passages)

    folder = tempfile.mkdtemp(prefix="ckd-ray-benchmark-")
    cells.save(f"{folder}/cells.safetensors")
    cores = os.cpu_count() or 1
    parts = [bench.feedback_BF[i : i + _PART] for i in range(0, len(bench.feedback_BF), _PART)]
    with multiprocessing.get_context("spawn").Pool(cores, _start, (bench.run, f"{folder}/cells.safetensors")) as pool:
        pool.map(_expand_part, parts[:cores], chunksize=1)  # warm
        ours, theirs = alternate(lambda: pool.map(_expand_part, parts, chunksize=1), literal)
    fast, slow = len(bench.feedback_BF) / ours, len(few) / theirs
    return {
        "expand_vs_literal": figure(fast / slow, 10, "higher"),
        "expand_queries_per_second": figure(fast, None, "higher"),
        "literal_queries_per_second": figure(slow, None, "higher"),
    }


_worker: dict[str, Any] = {}


def _start(run: Any, cells: str) -> None:
    """In a process of its own, as a task of the stage is: one thread, the store mapped, the cells read."""
    torch.set_num_threads(1)
    silent = load_tokenizer(str(run.folder / "teacher")).special_token_ids
    bench = Bench(run, np.zeros((0, 3), np.int64), None, None, silent, LabelConfig())  # type: ignore[arg-type]
    _worker.update(bench=bench, cells=SpecialCells.load(cells))


def _expand_part(feedback_BF: Int64Array) -> int:
    return int(_worker["bench"].expand(_worker["cells"], feedback_BF).counts_B.sum())


def _agreement(bench: Bench, cells: Any, index: Any, queries: int) -> dict[str, Any]:
    """Each way of voting against the exact nearest neighbours, on some queries."""
    note("expansion: agreement of the votes")
    feedback_BF = bench.feedback_BF[:: max(1, len(bench.feedback_BF) // queries)][:queries]
    voters = bench.settings.voters
    ways: dict[str, Any] = {
        "exact": lambda v: bench.token_ids_T[nearest_rows(v, bench.rows, voters)[1].cpu().numpy()],
        "ivfpq": lambda v: bench.token_ids_T[index.nearest(v, voters)[1]],
        "feedback": None,
    }
    elected = {"estimate": bench.expand(cells, feedback_BF)}
    for name, votes in ways.items():
        elected[name] = expand_ranked(
            bench.run.passages, feedback_BF, bench.settings, neighbours=votes, special_token_ids=bench.silent
        )
    found = _exact_votes(bench, feedback_BF)
    for name in ("estimate", "ivfpq", "feedback"):
        tokens, error, chosen = compare_votes(elected["exact"], elected[name])
        label = "vote_agreement" if name == "estimate" else f"vote_agreement_{name}"
        found[label] = figure(tokens, 0.79 if name == "estimate" else None, "higher")
        found[f"vote_idf_error_{name}"] = figure(error, None, "lower")
        found[f"vote_chosen_{name}"] = figure(chosen, None, "higher")
    return found


def _exact_votes(bench: Bench, feedback_BF: Int64Array) -> dict[str, Any]:
    """The neighbours of all centroids of these queries, after a first pass as the stage chooses it and in float32."""
    asked: list[Tensor] = []

    def votes(vectors_MD: Tensor) -> Any:
        asked.append(vectors_MD)
        return np.zeros((len(vectors_MD), bench.settings.voters), np.int64)

    expand_ranked(bench.run.passages, feedback_BF, bench.settings, neighbours=votes, special_token_ids=bench.silent)
    vectors_MD, k = torch.cat(asked), bench.settings.voters
    ours, theirs = alternate(
        lambda: nearest_rows(vectors_MD, bench.rows, k),
        lambda: nearest_rows(vectors_MD, bench.rows, k, first_pass="float32"),
    )
    return {
        "exact_votes_vs_float32": figure(theirs / ours, 3, "higher"),
        "exact_votes_centroids_per_second": figure(len(vectors_MD) / ours, None, "higher"),
    }


def compare_votes(exact: Expansions, other: Expansions, size: int = 10) -> tuple[float, float, float]:
    """(share of the centroids with the same token, among those that have one in either; mean absolute difference of
    idf where both have one; share of the `size` heaviest centroids that both choose)."""
    same, voted, errors, chosen = 0, 0, [], []
    for query in range(len(exact.counts_B)):
        a, b = (_by_centroid(expansions, query) for expansions in (exact, other))
        both = a.keys() & b.keys()
        voted += len(a.keys() | b.keys())
        same += sum(a[c][0] == b[c][0] for c in both)
        errors += [abs(a[c][1] - b[c][1]) for c in both]
        if a:
            kept = min(size, len(a))
            chosen.append(len(set(list(a)[:kept]) & set(list(b)[:kept])) / kept)
    return same / max(1, voted), float(np.mean(errors or [0.0])), float(np.mean(chosen or [1.0]))


def _by_centroid(expansions: Expansions, query: int) -> dict[bytes, tuple[int, float]]:
    """Centroid to (token, idf), heaviest first. Every way of voting gets the same centroids, bit for bit."""
    count = int(expansions.counts_B[query])
    return {
        centroid.numpy().tobytes(): (int(token), float(idf))
        for centroid, token, idf in zip(
            expansions.embeddings_BKD[query, :count],
            expansions.token_ids_BK[query, :count],
            expansions.idf_BK[query, :count],
            strict=True,
        )
    }
