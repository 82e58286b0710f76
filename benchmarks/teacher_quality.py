"""What the expansion, the clip of the published training score and the way of voting do to the teacher's own ranking.

    python benchmarks/teacher_quality.py --run DIR [--quick]

The top 100 of exact search without expansion are ranked again by the teacher's score (method.md, step 5), for the
dev queries (MRR@10) and the test queries (nDCG@10) of a finished run (up to `embed`), with and without
`distill.zero_row_floor`, for several beta and sizes of the expansion. Differences come with a paired randomisation
test. Then the same for the votes: the teacher's top 10 with approximate votes against exact ones. `--quick` takes 100
dev queries. Shapes: R query and expansion rows, N candidates, L rows a passage, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from common import arguments, emit, figure, machine, note
from label_store import PreparedRun

from ckd_ray.collective.expand import Expansions
from ckd_ray.collective.special_cells import SpecialCells
from ckd_ray.config import LabelConfig
from ckd_ray.evaluate.measures import measure_run
from ckd_ray.evaluate.significance import paired_difference
from ckd_ray.files import read_json
from ckd_ray.labels.feedback import expand_ranked
from ckd_ray.model.colbert import load_tokenizer
from ckd_ray.retrieve.exact import Scorer, search_all
from ckd_ray.retrieve.faiss_index import TokenIndex
from ckd_ray.retrieve.nearest import nearest_rows
from ckd_ray.retrieve.rows import FlatRows

MEASURES = {"dev": "MRR@10", "test": "nDCG@10"}
BETAS, SIZES, DEPTH = (0.1, 0.3, 1.0), (10, 24), 100
Array = npt.NDArray[Any]


@dataclass
class Split:
    """Queries of a split with their candidates, (B, N) dense indices, best first by exact search."""

    name: str
    ids: list[str]
    rows_BQD: torch.Tensor
    candidates_BN: Array
    qrels: pd.DataFrame


def main() -> None:
    options: dict[str, Any] = {"metavar": "DIR", "required": True, "help": "a run that has its embeddings already"}
    keep = {"metavar": "FILE", "help": "keep the candidates of the exact search here (.npz) for another call"}
    args = arguments(__doc__ or "", run=options, candidates=keep)
    before = machine()
    run = PreparedRun(Path(args.run).resolve())
    settings: dict[str, Any] = {"quick": args.quick, **run.describe(), "depth": DEPTH}
    bench = Bench(run)
    splits = bench.splits(100 if args.quick else None, args.candidates)
    cells = SpecialCells.of_store(run.passages, bench.silent, seed=17)
    found: dict[str, dict[str, Any]] = {}
    settings["rows"] = []
    for split in splits:
        expansions = bench.expand(split, None, cells)
        rows, figures = bench.compare_scores(split, expansions)
        settings["rows"] += rows
        found |= figures
    settings["votes"], figures = bench.compare_votes(splits[-1], cells)
    emit(settings, found | figures, before)


class Bench:
    """The run's store in memory."""

    def __init__(self, run: PreparedRun) -> None:
        self.run, self.store, self.settings = run, run.passages, LabelConfig()
        shards = [self.store.shard(i) for i in range(self.store.num_shards)]
        self.rows_TD = torch.cat([s.embeddings() for s in shards])
        self.token_ids_T = np.concatenate([s.token_ids for s in shards])
        self.silent = load_tokenizer(str(run.folder / "teacher")).special_token_ids
        self.similarity = read_json(str(run.folder / "teacher" / "colbert.json"))["similarity"]
        self.ids = run.collection.passage_ids(np.arange(self.store.num_passages))

    def splits(self, limit: int | None, kept: str | None) -> list[Split]:
        """The dev (cut to `limit`) and the test queries, with candidates from exact search or from the file `kept`."""
        index, known, found = None, {}, []
        if kept and Path(kept).exists():
            with np.load(kept, allow_pickle=False) as file:
                known = {name: file[name] for name in file.files}
        for name in MEASURES:
            queries, labels = self.run.collection.queries(name), self.run.collection.qrels(name)
            ids = queries.ids[: limit if name == "dev" else None]
            store = self.run.queries(name)
            rows_BQD = store.gather(np.arange(len(ids))).embeddings_TD.float().view(len(ids), -1, store.dim)
            if len(known.get(name, [])) < len(ids):
                note(f"exact search for {len(ids)} {name} queries")
                index = index or FlatRows(self.rows_TD, self.store.lengths())
                known[name] = np.concatenate([search_all(Scorer(part, index), DEPTH)[1] for part in rows_BQD.split(64)])
                if kept:
                    np.savez(kept, **known)
            qrels = {"query_id": labels.query_ids, "doc_id": labels.passage_ids, "relevance": labels.relevance}
            frame = pd.DataFrame(qrels)
            frame = frame[frame["query_id"].isin(set(ids))]
            found.append(Split(name, ids, rows_BQD, known[name][: len(ids)], frame))
        return found

    def expand(self, split: Split, votes: Any, cells: SpecialCells | None = None) -> Expansions:
        """Expansions from the top 3 candidates; with neither `votes` nor cells the feedback votes alone."""

        return expand_ranked(
            self.store,
            split.candidates_BN[:, : self.settings.feedback_passages],
            self.settings,
            neighbours=votes,
            special_token_ids=self.silent,
            in_special_cell=cells.in_special_cell if cells else None,
        )

    def similarities(self, split: Split, centroids_BKD: torch.Tensor) -> tuple[Array, Array]:
        """Of every query and expansion row with every candidate: sim (B, R, N) without and with the clip."""
        plain, clipped = [], []
        for rows_QD, centroids_KD, chosen in zip(split.rows_BQD, centroids_BKD, split.candidates_BN, strict=True):
            passages_NLD, mask_NL = self.store.gather(chosen).padded()
            passages_NLD = passages_NLD.float()
            a_RD = torch.cat([rows_QD, centroids_KD])
            if self.similarity == "cosine":
                a_RD = torch.nn.functional.normalize(a_RD, dim=1)
                bias_NL = torch.zeros(mask_NL.shape)
            else:
                bias_NL = passages_NLD.square().sum(-1) / -2
            bias_NL = bias_NL.masked_fill(~mask_NL, -torch.inf)
            best_RN = (a_RD @ passages_NLD.flatten(0, 1).T + bias_NL.flatten()).unflatten(1, bias_NL.shape).amax(2)
            for out, best in ((plain, best_RN), (clipped, best_RN.clamp_min(0.0))):
                full = best if self.similarity == "cosine" else 2 * best - a_RD.square().sum(1, keepdim=True)
                out.append(full.numpy())
        return np.stack(plain), np.stack(clipped)

    def compare_scores(self, split: Split, expansions: Expansions) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """A row for every setting: mean, and the paired difference to the teacher without expansion and clip."""
        note(f"{split.name}: {len(split.ids)} queries")
        measure, rows = MEASURES[split.name], []
        similarity = dict(zip((False, True), self.similarities(split, expansions.embeddings_BKD), strict=True))
        values: dict[tuple[bool, float, int], Array] = {}
        for clip in (False, True):
            for beta, size in ((0.0, 0), *((b, s) for b in BETAS for s in SIZES)):
                scores_BN = score(similarity[clip], expansions, beta, size)
                values[clip, beta, size] = self.measure(split, scores_BN, measure)
                base = values[False, 0.0, 0]
                rows.append(_row(split.name, measure, clip, beta, size, base, values[clip, beta, size]))
                if clip:
                    effect = paired_difference(values[False, beta, size], values[True, beta, size])
                    rows[-1] |= {"clip_difference": round(effect.mean, 4), "clip_p": round(effect.p, 4)}
                note("  " + " ".join(f"{k}={v}" for k, v in rows[-1].items() if k not in ("split", "measure")))
        name = f"teacher_{measure.lower().replace('@', '_at_')}_{split.name}"
        means = {key: float(v.mean()) for key, v in values.items()}
        return rows, {
            name: figure(means[False, 0.0, 0], None, "higher"),
            f"{name}_expanded": figure(means[False, 0.1, 10], None, "higher"),
            f"{name}_clipped": figure(means[True, 0.0, 0], None, "higher"),
            f"{name}_expanded_clipped": figure(means[True, 0.1, 10], None, "higher"),
        }

    def measure(self, split: Split, scores_BN: Array, measure: str) -> Array:
        """The measure of every query, when the candidates are ranked by these scores (ties by candidate order)."""
        order_BN = np.argsort(-scores_BN, axis=1, kind="stable")
        ranked = np.take_along_axis(split.candidates_BN, order_BN, 1)
        depth = ranked.shape[1]
        run = pd.DataFrame(
            {
                "query_id": np.repeat(split.ids, depth),
                "doc_id": [self.ids[p] for p in ranked.ravel()],
                "score": np.tile(np.arange(depth, 0, -1.0), len(ranked)),
            }
        )
        per_query = measure_run(run, split.qrels, [measure]).per_query[measure]
        return np.array([per_query[query] for query in dict.fromkeys(split.qrels["query_id"])])

    def compare_votes(self, split: Split, cells: SpecialCells) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The teacher's ranking (beta 0.1 and 1, 10 centroids) by each way of voting, against exact votes."""
        note(f"votes: {split.name}")
        rows = FlatRows(self.rows_TD, self.store.lengths())
        index = TokenIndex(rows)
        ways: dict[str, Any] = {
            "exact": lambda v: self.token_ids_T[nearest_rows(v, rows, 10)[1].cpu().numpy()],
            "estimate": None,
            "ivfpq": lambda v: self.token_ids_T[index.nearest(v, 10)[1]],
            "feedback": None,
        }
        measure, table, figures = MEASURES[split.name], [], {}
        exact: dict[float, tuple[Array, Array]] = {}
        for name, votes in ways.items():
            expansions = self.expand(split, votes, cells if name == "estimate" else None)
            similarity = self.similarities(split, expansions.embeddings_BKD)[0]
            for beta in (0.1, 1.0):
                scores_BN = score(similarity, expansions, beta, 10)
                top = np.argsort(-scores_BN, axis=1, kind="stable")[:, :10]
                values = self.measure(split, scores_BN, measure)
                exact.setdefault(beta, (top, values))
                overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact[beta][0], top, strict=True)])
                difference = paired_difference(exact[beta][1], values)
                row = {"votes": name, "beta": beta, measure: round(float(values.mean()), 4)}
                row |= {"top_10_as_exact": round(float(overlap), 4), "p": round(difference.p, 4)}
                table.append(row)
                note("  " + " ".join(f"{k}={v}" for k, v in row.items()))
                if name == "estimate":
                    figures[f"votes_top_10_as_exact_beta_{beta:g}"] = figure(float(overlap), None, "higher")
        return table, figures


def score(similarity_BRN: Array, expansions: Expansions, beta: float, size: int) -> Array:
    """s_T (B, N): all query rows, and the first `size` centroids weighted by beta * idf."""
    weights_BK = beta * expansions.idf_BK.numpy().astype(np.float64)
    weights_BK[:, size:] = 0
    query_rows = similarity_BRN.shape[1] - weights_BK.shape[1]
    weights_BR = np.concatenate([np.ones((len(weights_BK), query_rows)), weights_BK], 1)
    return np.einsum("br,brn->bn", weights_BR, similarity_BRN)


def _row(split: str, measure: str, clip: bool, beta: float, size: int, base: Array, values: Array) -> dict[str, Any]:
    difference = paired_difference(base, values)
    return {
        "split": split,
        "measure": measure,
        "zero_row_floor": clip,
        "beta": beta,
        "size": size,
        "mean": round(float(values.mean()), 4),
        "difference": round(difference.mean, 4),
        "low": round(difference.low, 4),
        "high": round(difference.high, 4),
        "p": round(difference.p, 4),
    }


if __name__ == "__main__":
    main()
