"""Re-ranking against the published step query by query, and the recall and rate of retrieval.

`rerank_vs_literal`: pairs of a query and a candidate passage scored a second, over those of a literal version: for each
query gather its candidates' float16 rows, pad them to (N, L, D) float32, multiply, take the maximum, sum, sort. Both
score the same candidates. `retrieve_recall_at_100` and `retrieve_queries_per_second`: the retrieve stage's own engine
for so many training queries, over the shard servers, index and all; `auto` may choose exact search, so the approximate
engines are stated beside it. `exact_vs_float32`: queries a second of exact search with its first pass in 8 bits, over
those with the first pass in float32, for a batch of the retrieve stage; both must give the same rankings and scores.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from common import alternate, figure, note

from ckd_ray.retrieve.exact import Scorer, search_all
from ckd_ray.retrieve.faiss_index import candidate_passages
from ckd_ray.retrieve.int8 import FirstPass, choose_first_pass, has_exact_products
from ckd_ray.retrieve.rows import FlatRows
from ckd_ray.retrieve.shard_range import RERANK_FACTOR, SearchSettings, ShardRange, choose_engine

_DEPTH = 100
_BATCH = 256  # queries of a part of the retrieve stage


def figures(run: Any, quick: bool, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """See the module's docstring."""
    store, queries = run.passages, run.queries("train")
    shards = list(range(store.num_shards))
    count = min(queries.num_passages, 32 if quick else _BATCH)
    chosen = np.sort(np.random.default_rng(3).choice(queries.num_passages, count, replace=False))
    asked = queries.gather(chosen).embeddings_TD.float().view(count, -1, queries.dim)
    found = _rerank(store, shards, asked, settings)
    batch = queries.gather(np.arange(min(queries.num_passages, _BATCH))).embeddings_TD
    found |= _first_passes(store, shards, batch.view(-1, asked.shape[1], queries.dim), settings)
    return found | _retrieve(run, store, shards, asked, quick, settings)


def rerank(
    queries_BQD: torch.Tensor, candidates: list[Any], rows_TD: torch.Tensor, lengths: np.ndarray
) -> list[np.ndarray]:
    """float32 scores of each query's own candidates (positions of passages), in their order."""
    query_P = np.repeat(np.arange(len(candidates)), [len(c) for c in candidates])
    passage_P = np.concatenate(candidates).astype(np.int64)
    scores_P = Scorer(queries_BQD, FlatRows(rows_TD, lengths), rows_TD.device).pairs(query_P, passage_P)
    return np.split(scores_P, np.cumsum([len(c) for c in candidates])[:-1])


def literal_rerank(
    asked_BQD: torch.Tensor, candidates: list[np.ndarray], rows_TD: torch.Tensor, lengths: np.ndarray
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(scores, order) a query, as the published code ranks: padded candidates, one query at a time."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    out = []
    for query_QD, chosen in zip(asked_BQD, candidates, strict=True):
        passages = [rows_TD[offsets[p] : offsets[p + 1]] for p in chosen]
        padded_NLD = torch.nn.utils.rnn.pad_sequence(passages, batch_first=True).float()
        sizes = torch.from_numpy(lengths[chosen])
        mask_NL = torch.arange(padded_NLD.shape[1])[None] < sizes[:, None]
        similarity_NQL = torch.einsum("qd,nld->nql", query_QD, padded_NLD)
        best_NQ = similarity_NQL.masked_fill(~mask_NL[:, None], -1.0).amax(2)
        out.append(best_NQ.sum(1).sort(descending=True))
    return out


def _rerank(store: Any, shards: list[int], asked: torch.Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """On all passages of the 1,024 nearest embeddings of every query row, as published; and on the most promising
    of them, as many as the stage scores. Short lists share fewer passages and go slower, so both are stated."""
    served = ShardRange(store, shards, SearchSettings("faiss"))
    if served._faiss is None:
        raise SystemExit("too few token embeddings to re-rank candidates of")
    distances, positions = served._faiss.nearest(asked.reshape(-1, store.dim), 1024)
    shape = (len(asked), asked.shape[1], -1)
    near = list(zip(distances.reshape(shape), positions.reshape(shape), strict=True))
    rows_TD = torch.cat([store.shard(i).embeddings() for i in shards])
    lengths = served.rows.lengths
    out = {}
    for name, limit in (("rerank", len(lengths)), ("rerank_short", RERANK_FACTOR * _DEPTH)):
        candidates = [candidate_passages(d, p, served._passage_of, limit) for d, p in near]
        mine = rerank(asked, candidates, rows_TD, lengths)
        literal = literal_rerank(asked[:4], candidates[:4], rows_TD, lengths)
        for scores, (ranked, _) in zip(mine[:4], literal, strict=True):
            assert np.allclose(np.sort(scores)[::-1], ranked.numpy(), atol=1e-3), "the two versions disagree"
        some = max(4, len(asked) // 16)  # the literal version is slow: its rate comes from a part of the queries
        fast, slow = alternate(
            lambda c=candidates: rerank(asked, c, rows_TD, lengths),
            lambda c=candidates, n=some: literal_rerank(asked[:n], c[:n], rows_TD, lengths),
            rounds=3,
        )
        rate = sum(map(len, candidates)) / fast
        literal_rate = sum(map(len, candidates[:some])) / slow
        mean = sum(map(len, candidates)) / len(candidates)
        settings[name] = {"queries": len(asked), "candidates_a_query": mean, "literal_pairs_per_second": literal_rate}
        note(f"{name}: {mean:.0f} candidates a query, {rate:,.0f} pairs/s, literal {literal_rate:,.0f} pairs/s")
        out[f"{name}_vs_literal"] = figure(rate / literal_rate, 10 if name == "rerank" else None, "higher")
        out[f"{name}_pairs_per_second"] = figure(rate, None, "higher")
    return out


def _first_passes(store: Any, shards: list[int], batch_BQD: torch.Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Both first passes in this process, in turn. Without exact products in 8 bits there is nothing to compare."""
    scorer = Scorer(batch_BQD, ShardRange(store, shards, SearchSettings("exact")).rows)
    chosen, reason = choose_first_pass()
    settings["exact"] = {"queries": len(batch_BQD), "depth": _DEPTH, "first_pass_by_auto": f"{chosen} ({reason})"}
    if not has_exact_products():
        return {"exact_vs_float32": figure(None, 4, "higher")}
    answers: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def search(first_pass: FirstPass) -> None:
        answers[first_pass] = search_all(scorer, _DEPTH, first_pass)

    fast, slow = alternate(lambda: search("int8"), lambda: search("float32"), rounds=3)
    for mine, other in zip(answers["int8"], answers["float32"], strict=True):
        assert np.array_equal(mine, other), "the first pass has changed a ranking"
    settings["exact"] |= {"queries_per_second": len(batch_BQD) / fast, "float32": len(batch_BQD) / slow}
    note(f"exact: {len(batch_BQD) / fast:.1f} queries/s, first pass in float32 {len(batch_BQD) / slow:.1f} queries/s")
    return {"exact_vs_float32": figure(slow / fast, 4, "higher")}


def _retrieve(
    run: Any, store: Any, shards: list[int], asked: torch.Tensor, quick: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    from ckd_ray.ray_util.session import connected
    from ckd_ray.retrieve.servers import serving

    total = run.queries("train").num_passages
    codec = store.manifest["codec"]
    chosen = choose_engine(total, asked.shape[1], store.num_tokens, store.dim, codec)
    batch = asked.numpy()
    found: dict[str, Any] = {}
    with connected("local"):
        with serving(store, SearchSettings("exact")) as servers:
            servers.search(batch[:2], _DEPTH)
            started = time.perf_counter()
            _, truth = servers.search(batch, _DEPTH)
            rate = len(batch) / (time.perf_counter() - started)
        found["exact"] = (1.0, rate)
        for engine in ("faiss", *(["centroids"] if codec != "fp16" else [])):
            with serving(store, SearchSettings(engine)) as servers:
                servers.search(batch[:2], _DEPTH)
                started = time.perf_counter()
                _, ranked = servers.search(batch, _DEPTH)
                rate = len(batch) / (time.perf_counter() - started)
            hits = [len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(truth, ranked, strict=True)]
            found[engine] = (sum(hits) / int((truth >= 0).sum()), rate)
            note(f"{engine}: recall@{_DEPTH} {found[engine][0]:.4f}, {found[engine][1]:.1f} queries/s")
    settings["retrieve"] = {"engine_by_auto": chosen, "queries": len(batch)}
    out = {
        # Of the approximate engine: exact search has recall 1 by definition.
        "retrieve_recall_at_100": figure(found["faiss"][0], 0.98, "higher"),
        "retrieve_queries_per_second": figure(found[chosen][1], None, "higher"),
    }
    for engine, (recall, rate) in found.items():
        out[f"retrieve_{engine}_recall_at_100"] = figure(recall, None, "higher")
        out[f"retrieve_{engine}_queries_per_second"] = figure(rate, None, "higher")
    return out
