"""The expansions of queries, from their rankings and the token-embedding store (method.md, steps 3 and 4). No Ray.

Shapes: B queries, F feedback passages a query, D dimensions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ckd_ray.arrays import Int64Array, IntArray
from ckd_ray.collective.expand import Expansions, InSpecialCell, Neighbours, expand
from ckd_ray.config import LabelConfig
from ckd_ray.errors import JobError
from ckd_ray.store import EmbeddingStore, Ragged


def expand_ranked(
    store: EmbeddingStore,
    feedback_BF: IntArray,
    settings: LabelConfig,
    *,
    neighbours: Neighbours | None,
    special_token_ids: Any,
    in_special_cell: InSpecialCell | None = None,
) -> Expansions:
    """The expansions of queries whose feedback passages are known.

    Args:
        feedback_BF: dense passage indices, best first, -1 after the end of a ranking. A query without any gets an empty
            expansion; its teacher then scores without one.
        neighbours: finds the voters in the collection, see `expand`. None: the feedback's own tokens vote.
        special_token_ids: token ids that do not vote.
        in_special_cell: see `expand`.

    Raises:
        JobError: the store holds numbers that are not finite; names the passage.
    """
    present_BF = feedback_BF >= 0
    chosen = feedback_BF[present_BF].astype(np.int64)
    # Many queries share feedback passages: each is read once.
    distinct, place = np.unique(chosen, return_inverse=True)
    read = store.gather(distinct)
    passages, token_ids = read.split(), np.split(read.token_ids, np.cumsum(read.lengths)[:-1])
    counts = present_BF.sum(axis=1)
    try:
        return expand(
            nest([passages[i] for i in place], counts),
            neighbours=neighbours,
            document_frequencies=store.document_frequencies,
            num_passages=store.num_passages,
            special_token_ids=special_token_ids,
            clusters=settings.clusters,
            voters=settings.voters,
            tokens=nest([token_ids[i] for i in place], counts) if neighbours is None else None,
            token_vote="feedback" if neighbours is None else "collection",
            dim=store.dim,
            in_special_cell=in_special_cell,
        )
    except ValueError:
        # k-means refuses such numbers anyway. A check beforehand would cost a tenth of the stage.
        _check_finite(read, distinct, store.uri)
        raise


def expand_depths(
    store: EmbeddingStore, feedback_BF: IntArray, settings: LabelConfig, **voting: Any
) -> dict[int, Expansions]:
    """`expand_ranked` from the top `depth` of the feedback, for each depth of `settings.feedback_passages`.

    Args:
        voting: the keyword arguments of `expand_ranked`.
    """
    return {depth: expand_ranked(store, feedback_BF[:, :depth], settings, **voting) for depth in settings.depths}


def nest(flat: Any, counts: Any) -> list[Any]:
    """Cut a flat list into one list a query."""
    bounds = np.concatenate([[0], np.cumsum(counts)]).tolist()
    flat = list(flat)
    return [flat[low:high] for low, high in pairwise(bounds)]


def _check_finite(read: Ragged, passages: Int64Array, uri: str) -> None:
    bad = (~torch.isfinite(read.embeddings_TD).all(1)).nonzero()[:, 0]
    if len(bad):
        row = int(np.searchsorted(np.cumsum(read.lengths), int(bad[0]), side="right"))
        raise JobError(
            f"{uri}: passage {passages[row]} (counted from 0) has an embedding that is not finite; "
            "the encoder overflowed: embed again with embed.precision fp32"
        )
