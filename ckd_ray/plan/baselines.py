"""Seconds of a run's baselines: the encoder as it is, and BM25. Arithmetic alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckd_ray.config import Config
from ckd_ray.plan.rates import Rates
from ckd_ray.plan.search_time import Part
from ckd_ray.plan.sizes import Sizes

if TYPE_CHECKING:
    from ckd_ray.plan.estimate import Layout

# BM25 on one core of an Intel Xeon (Sapphire Rapids generation), in processor time: words and index of 20,000 passages
# of 55 words (72 microseconds a passage), and a ranking of 200,000 passages for queries of 8 words (3.0 ms each).
_BM25_TOKEN_S, _BM25_SCORE_S = 1e-6, 1.5e-8


def baseline_parts(
    config: Config, sizes: Sizes, rates: Rates, layout: Layout, starts: list[Part], count: int, depth: int
) -> list[Part]:
    """The encoder as it is embeds the corpus once more, a row a text, whose search costs next to nothing. BM25 reads
    and indexes N tokens and scores N passages a query, in one process. Each has q K rows to write and to measure.

    Args:
        starts: of the processes that the encoder needs.
        count, depth: q and K, queries that are measured and passages of a ranking.
    """
    parts: list[Part] = []
    names = [n for n in config.evaluate.baselines if n != "bm25" or sizes.passages <= config.evaluate.bm25_passages]
    if "encoder" in names:
        gpus = layout.actors * min(1.0, layout.actor_gpus)
        each = rates.encode_token_s + (0.0 if gpus else rates.tokenize_token_s)
        seconds = sizes.passages * sizes.tokens * each / (gpus or layout.cpus)
        parts += [*starts, Part("encode (encoder as it is)", seconds, "encoder", scales=True)]
    if "bm25" in names:
        seconds = sizes.passages * (sizes.tokens * _BM25_TOKEN_S + count * _BM25_SCORE_S)
        parts.append(Part("BM25", seconds, "one process"))
    if names:
        rows = len(names) * count * depth
        parts.append(Part("run files and measures (baselines)", rows * rates.evaluate_row_s, "driver"))
    return parts
