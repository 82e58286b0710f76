"""The score scale of a training: the divisor of the student's scores before the softmax of the loss.

MaxSim adds one similarity for each query row. With 32 rows the scores of random passages lie several units apart, and
the label lies tens of units above them. An undivided softmax then gives the label all the probability, the loss is
0.000 in most steps, and training only widens the gaps. Dividing by the spread of the scores keeps every passage of the
batch in the loss, for any encoder, query length and similarity (measured in evidence.md). Shapes: B queries, N
passages.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ckd_ray.data import Collection
from ckd_ray.data.positives import Positives
from ckd_ray.distill.batches import Batch, BatchPlan, valid_mask
from ckd_ray.model import ColBERT, maxsim
from ckd_ray.model.encoder import Precision, computing

# The scale in standard deviations of a query's scores over random passages. Training at this scale about doubles the
# spread, so half the factor gives a trained model the same scale.
UNTRAINED, TRAINED = 1.25, 0.55
_QUERIES, _PASSAGES_A_QUERY = 32, 2
_SMALLEST = 1e-3


def measured_scale(
    model: ColBERT,
    collection: Collection,
    positives: Positives,
    *,
    trained: bool,
    seed: int,
    precision: Precision,
    doc_maxlen: int | None = None,
    left_out: Sequence[int] = (),
) -> float:
    """The scale for a training that starts from `model`. It follows from the model's scores of 32 training queries and
    64 passages, their labels and as many others, which `seed` determines.

    Args:
        trained: whether the model was trained for MaxSim; False for a new projection.
        doc_maxlen: most tokens of a passage in the training; `model.doc_maxlen` when None.
        left_out: see `BatchPlan`.
    """
    batch = scale_batch(positives, collection.num_passages, seed, left_out)
    texts = collection.queries("train").texts
    before = model.training
    model.eval()
    try:
        with torch.no_grad(), computing(model.device, precision):
            queries = [
                x.to(model.device) for x in model.tokenizer.queries([texts[i] for i in batch.queries_B.tolist()])
            ]
            queries_BQD = model.encode_queries(*queries, as_in_training=True)
            passages = collection.texts(batch.passages_BM.reshape(-1))
            ids, mask = model.tokenizer.pad(model.tokenizer.passages(passages, doc_maxlen))
            rows = model.encode_passages(ids.to(model.device), mask.to(model.device))
        scores_BN = maxsim(queries_BQD, *rows, similarity=model.settings.similarity)
    finally:
        model.train(before)
    others_BN = torch.from_numpy(valid_mask(batch, positives)).to(scores_BN.device)
    others_BN[torch.arange(_QUERIES), torch.arange(_QUERIES) * _PASSAGES_A_QUERY] = False
    return round(max(_SMALLEST, spread(scores_BN, others_BN) * (TRAINED if trained else UNTRAINED)), 4)


def scale_batch(positives: Positives, num_passages: int, seed: int, left_out: Sequence[int] = ()) -> Batch:
    """The queries and passages that the scale is measured on."""
    plan = BatchPlan(
        positives,
        num_passages=num_passages,
        batch_size=_QUERIES,
        negatives=_PASSAGES_A_QUERY - 1,
        seed=seed,
        left_out=left_out,
    )
    return plan.batch(0)


def spread(scores_BN: Tensor, counted_BN: Tensor) -> float:
    """Mean over the queries with two or more counted scores of the standard deviation of these scores."""
    rows = [row[kept].double() for row, kept in zip(scores_BN, counted_BN, strict=True)]
    found = [float(row.std()) for row in rows if len(row) > 1]
    return float(np.mean(found)) if found else 0.0
