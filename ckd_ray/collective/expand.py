"""Collective knowledge: the expansion embeddings of a batch of queries, computed together (method.md, step 4).

Shapes: B queries, K clusters, T points of a query, D dimensions, M centroids of the batch, V voters, E kept embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ckd_ray.arrays import BoolArray, IntArray
from ckd_ray.collective import native
from ckd_ray.collective.kmeans import kmeans, start_positions
from ckd_ray.collective.votes import elect_tokens, inverse_document_frequency

Neighbours = Callable[[Tensor], IntArray]
InSpecialCell = Callable[[Tensor], BoolArray]

# Padded points (rows of D floats) held at a time. This bounds the memory of a call, whatever the number of queries.
_POINTS = 1 << 17
# Queries are padded to a multiple of this many points. The padding depends on the query alone, so the other queries of
# a batch do not change its result.
_PAD = 64


@dataclass(frozen=True)
class Expansions:
    """All kept centroids of B queries, highest idf first; rows after the last are zero.

    Attributes:
        embeddings_BKD: float32, not re-normalised.
        idf_BK: float32, the weight at beta = 1.
        token_ids_BK: int64, -1 after the last.
        counts_B: int64, the number of centroids of each query.
    """

    embeddings_BKD: Tensor
    idf_BK: Tensor
    token_ids_BK: Tensor
    counts_B: Tensor

    def select(self, size: int, beta: float = 1.0) -> tuple[Tensor, Tensor]:
        """The `size` centroids of highest idf: (expansions_BED, weights_BE = beta * idf); missing ones weigh 0."""
        short = max(0, size - self.idf_BK.shape[1])
        embeddings = torch.nn.functional.pad(self.embeddings_BKD[:, :size], (0, 0, 0, short))
        return embeddings, beta * torch.nn.functional.pad(self.idf_BK[:, :size], (0, short))


@torch.no_grad()
def expand(
    feedback: Sequence[Sequence[Tensor]],
    *,
    neighbours: Neighbours | None = None,
    document_frequencies: Any,
    num_passages: int,
    special_token_ids: Any = (),
    clusters: int = 24,
    voters: int = 10,
    tokens: Sequence[Sequence[Any]] | None = None,
    token_vote: Literal["collection", "feedback"] = "collection",
    dim: int | None = None,
    in_special_cell: InSpecialCell | None = None,
) -> Expansions:
    """Cluster the feedback of every query, elect a token for each centroid, and weigh the centroid by the token's idf.

    Args:
        feedback: for each query its feedback passages, each (L_i, D). A query without feedback, or whose passages have
            no rows, gets no expansion.
        neighbours: maps vectors (M, D) to the token ids (M, V) of their nearest token embeddings in the collection,
            nearest first, -1 for none; V should be `voters`. Not needed for `token_vote` `feedback`.
        document_frequencies: the number of passages that hold each token id, one value a token of the vocabulary.
        num_passages: N of the idf.
        special_token_ids: token ids that do not vote.
        clusters: K; a query with fewer token embeddings gets as many clusters as it has embeddings.
        voters: the number of neighbours that vote.
        tokens: token ids of the feedback, nested like it; needed for `token_vote` `feedback`.
        token_vote: who votes: the nearest token embeddings of the whole `collection` (the paper), or those of the
            query's own `feedback`.
        in_special_cell: maps centroids (M, D) to bool (M,). True drops a centroid: in the collection, only special
            tokens lie around it. The feedback alone holds too few special tokens to show that.
        dim: D of a batch in which no query has feedback; otherwise D follows from the feedback.

    Raises:
        ValueError: an argument is missing or below 1, or an embedding is not finite.
    """
    if clusters < 1 or voters < 1:
        raise ValueError(f"clusters and voters must be 1 or more, not {clusters} and {voters}")
    if token_vote == "feedback" and tokens is None:
        raise ValueError("token_vote 'feedback' needs the feedback's token ids (tokens)")
    if token_vote == "collection" and neighbours is None:
        raise ValueError("token_vote 'collection' needs neighbours")
    if dim is None:
        dim = next((p.shape[1] for passages in feedback for p in passages), 0)
    embeddings_BKD = torch.zeros(len(feedback), clusters, dim)
    neighbours_BKV = np.full((len(feedback), clusters, voters), -1, np.int64)
    present_BK = np.zeros((len(feedback), clusters), bool)
    lengths = [[p.shape[0] for p in passages] for passages in feedback]
    for group in _groups([sum(query) for query in lengths]):
        sizes = [lengths[i] for i in group]
        points_BTD, mask_BT = _stack([feedback[i] for i in group], sizes)
        start_BKD, mask_BK = _start(points_BTD, sizes, clusters)
        found = kmeans(points_BTD, mask_BT, start_BKD, mask_BK)
        embeddings_BKD[group] = found.centroids_BKD.cpu()
        present_BK[group] = (found.sizes_BK > 0).cpu().numpy()
        if token_vote == "feedback":
            assert tokens is not None
            token_ids_BT = _stack_ids([tokens[i] for i in group], mask_BT.shape[1])
            neighbours_BKV[group] = _own_neighbours(found.centroids_BKD, points_BTD, mask_BT, token_ids_BT, voters)
    if token_vote == "collection" and present_BK.any():
        assert neighbours is not None
        answers = np.asarray(neighbours(embeddings_BKD[torch.from_numpy(present_BK)]))[:, :voters]
        block = np.full((len(answers), voters), -1, np.int64)
        block[:, : answers.shape[1]] = answers
        neighbours_BKV[present_BK] = block
    if in_special_cell is not None and present_BK.any():
        present_BK[present_BK] = ~in_special_cell(embeddings_BKD[torch.from_numpy(present_BK)])
    return _select(embeddings_BKD, neighbours_BKV, present_BK, document_frequencies, num_passages, special_token_ids)


def _groups(sizes: list[int]) -> list[list[int]]:
    """Queries of the same padded size, as many in a group as the memory bound allows; empty queries are left out."""
    padded: dict[int, list[int]] = {}
    for query, size in enumerate(sizes):
        if size:
            padded.setdefault(-(-size // _PAD) * _PAD, []).append(query)
    groups = []
    for size, members in sorted(padded.items()):
        step = max(1, _POINTS // size)
        groups += [members[i : i + step] for i in range(0, len(members), step)]
    return groups


def _stack(feedback: list[Sequence[Tensor]], sizes: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(points_BTD, mask_BT): float32, padded with zeros to a multiple of `_PAD`."""
    totals = [sum(query) for query in sizes]
    first = feedback[0][0]
    width = -(-max(totals) // _PAD) * _PAD
    points_BTD = torch.empty(len(feedback), width, first.shape[1], device=first.device)
    mask_BT = torch.arange(width, device=first.device)[None] < torch.tensor(totals, device=first.device)[:, None]
    for row, (passages, lengths, total) in enumerate(zip(feedback, sizes, totals, strict=True)):
        parts = points_BTD[row].split([*lengths, width - total])
        for part, passage in zip(parts, passages, strict=False):
            part.copy_(passage)
        parts[-1].zero_()
    return points_BTD, mask_BT


def _stack_ids(tokens: list[Sequence[Any]], width: int) -> IntArray:
    """token_ids_BT, -1 on padding."""
    token_ids_BT = np.full((len(tokens), width), -1, np.int64)
    for row_T, passages in zip(token_ids_BT, tokens, strict=True):
        ids = np.concatenate(passages)
        row_T[: len(ids)] = ids
    return token_ids_BT


def _start(points_BTD: Tensor, sizes: list[list[int]], clusters: int) -> tuple[Tensor, Tensor]:
    """(start_BKD, mask_BK): the points that seed the clusters, and which clusters a query has."""
    rows_BK = np.full((len(sizes), clusters), -1, np.int64)
    for row_K, lengths in zip(rows_BK, sizes, strict=True):
        starts = start_positions(lengths, clusters)
        row_K[: len(starts)] = starts
    index_BK = torch.from_numpy(rows_BK).to(points_BTD.device)
    mask_BK = index_BK >= 0
    start_BKD = points_BTD.gather(1, index_BK.clamp(min=0)[:, :, None].expand(-1, -1, points_BTD.shape[2]))
    return start_BKD * mask_BK[:, :, None], mask_BK


def _own_neighbours(
    centroids_BKD: Tensor, points_BTD: Tensor, mask_BT: Tensor, token_ids_BT: IntArray, voters: int
) -> IntArray:
    """Token ids (B, K, V) of the nearest points of the query's own feedback, nearest first; -1 for none."""
    if native.available(points_BTD):
        order_BKV = native.nearest(points_BTD, mask_BT, centroids_BKD, voters).numpy()
    else:
        bias_BT = (torch.linalg.vector_norm(points_BTD, dim=2).square() / -2).masked_fill(~mask_BT, -torch.inf)
        score_BKT = torch.baddbmm(bias_BT[:, None], centroids_BKD, points_BTD.transpose(1, 2))
        order_BKV = _highest(score_BKT, min(voters, score_BKT.shape[2])).cpu().numpy()
        short = voters - order_BKV.shape[2]
        order_BKV = np.pad(order_BKV, ((0, 0), (0, 0), (0, short)), constant_values=-1)
    rows = np.arange(len(order_BKV))[:, None, None]
    return np.where(order_BKV >= 0, token_ids_BT[rows, order_BKV], -1)


def _highest(score_BKT: Tensor, k: int) -> Tensor:
    """Positions (B, K, k) of the highest scores, highest first; equal scores in the order of the text.

    This is the result of a stable sort, in a fifth of the time. `topk` alone orders equal scores arbitrarily.
    """
    best = score_BKT.topk(k, dim=-1)
    positions_BKk, order = best.indices.sort(dim=-1)
    order = best.values.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    positions_BKk = positions_BKk.gather(-1, order)
    tied_BK = (score_BKT >= best.values[:, :, -1:]).sum(-1) > k
    if bool(tied_BK.any()):
        exact = score_BKT[tied_BK].sort(dim=-1, descending=True, stable=True).indices[:, :k]
        positions_BKk[tied_BK] = exact
    return positions_BKk


def _select(
    embeddings_BKD: Tensor,
    neighbours_BKV: IntArray,
    present_BK: BoolArray,
    document_frequencies: Any,
    num_passages: int,
    special_token_ids: Any,
) -> Expansions:
    """Elect tokens, drop centroids without a vote, and sort by idf (stable: equal ones keep the clusters' order)."""
    num_queries, clusters, voters = neighbours_BKV.shape
    tokens_M = elect_tokens(neighbours_BKV.reshape(-1, voters), np.asarray(special_token_ids, np.int64))[0]
    tokens_BK = tokens_M.reshape(num_queries, clusters)
    kept_BK = present_BK & (tokens_BK >= 0)
    idf_BK = inverse_document_frequency(tokens_BK, np.asarray(document_frequencies), num_passages)
    order_BK = np.argsort(np.where(kept_BK, -idf_BK, np.inf), axis=1, kind="stable")
    counts_B = torch.from_numpy(kept_BK.sum(1).astype(np.int64))
    idf_BK = np.take_along_axis(np.where(kept_BK, idf_BK, 0.0), order_BK, 1).astype(np.float32)
    tokens_BK = np.take_along_axis(np.where(kept_BK, tokens_BK, -1), order_BK, 1)
    index_BK = torch.from_numpy(order_BK)
    sorted_BKD = embeddings_BKD.gather(1, index_BK[:, :, None].expand(-1, -1, embeddings_BKD.shape[2]))
    behind_BK = torch.arange(clusters)[None] >= counts_B[:, None]
    sorted_BKD = sorted_BKD.masked_fill(behind_BK[:, :, None], 0.0)
    return Expansions(sorted_BKD, torch.from_numpy(idf_BK), torch.from_numpy(tokens_BK), counts_B)
