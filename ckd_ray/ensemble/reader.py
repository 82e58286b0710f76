"""The ensemble's part of the teacher's scores of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ckd_ray.config.schema import DistillConfig
from ckd_ray.cross_encoder.scores import CrossScores, Int64Array
from ckd_ray.ensemble.weights import SPLIT, factor, read_weights
from ckd_ray.files import join


class EnsembleReader:
    """Weighted scores of further scorers, by dense query and passage index."""

    def __init__(self, readers: Sequence[CrossScores], factors: Sequence[float]) -> None:
        self.readers, self.factors = readers, factors

    @classmethod
    def open(cls, folder: str, settings: DistillConfig, scorers: Sequence[str]) -> EnsembleReader:
        """The scores that an ensemble stage has written to `folder`, weighted as `settings` say.

        Args:
            scorers: which ones are asked for; one that the stage had to leave out is left out.
        """
        weights, teacher_spread = read_weights(folder)
        shares = {name: getattr(settings, f"{name}_share") for name in scorers if name in weights}
        numbers = sum(share for share in shares.values() if share != "auto")
        expansion = 1 / (1 - settings.expansion_share) if settings.beta == "auto" else 1.0
        factors = {
            name: factor(weights[name], share, numbers, teacher_spread, expansion) for name, share in shares.items()
        }
        used = [name for name, value in factors.items() if value > 0]
        return cls(
            [CrossScores.open(join(folder, name), SPLIT, "ensemble") for name in used], [factors[name] for name in used]
        )

    def of_batch(self, queries_b: Int64Array, passages_N: Int64Array) -> tuple[Tensor, Tensor | None]:
        """(scores_bN, scored_bN): what is added to the teacher's scores, and which pairs have it; None for all."""
        total_bN, all_bN = torch.zeros(len(queries_b), len(passages_N)), None
        for reader, weight in zip(self.readers, self.factors, strict=True):
            scores_bN, scored_bN = reader.scores_and_mask(queries_b, passages_N)
            total_bN += weight * scores_bN
            all_bN = scored_bN if all_bN is None else all_bN & scored_bN
        return total_bN, all_bN
