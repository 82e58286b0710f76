"""The settings of a ColBERT model: what must be the same wherever its embeddings are made or compared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ckd_ray.errors import first_mistake

Similarity = Literal["l2", "cosine"]
# A text has [CLS], a marker and [SEP] at least.
_Length = Annotated[int, Field(ge=3)]


@dataclass(frozen=True)
class ColBERTSettings:
    """Saved as `colbert.json` in the folder of the weights.

    Attributes:
        dim: D, numbers an embedding.
        query_maxlen: rows of every query, filled with the mask token (query augmentation).
        doc_maxlen: most tokens of a passage, markers included.
        mask_punctuation: punctuation tokens of passages give no embedding.
        similarity: `l2` (minus the squared distance) or `cosine`; on unit rows both rank alike.
        query_marker, doc_marker: the tokens [Q] and [D] that follow the first special token; "" for none.
        attend_to_mask: whether the query's other tokens attend to its augmentation (False as published).
        query_expansion: whether a query has rows for its augmentation where it is searched with. Otherwise the rows
            after its text are zero and add nothing to a score.
        training_expansion: whether training has these rows when `query_expansion` is False.
        skip_tokens: tokens of passages that give no embedding, for models that skip others than punctuation; None
            leaves the choice to `mask_punctuation`.
        score_scale: what scores were divided by in the softmax of the loss that trained the model; None when unknown.
            It changes no score and no ranking.
    """

    dim: Annotated[int, Field(ge=1)] = 128
    query_maxlen: _Length = 32
    doc_maxlen: _Length = 180
    mask_punctuation: bool = True
    similarity: Similarity = "l2"
    query_marker: str = "[unused0]"
    doc_marker: str = "[unused1]"
    attend_to_mask: bool = False
    query_expansion: bool = True
    training_expansion: bool = False
    skip_tokens: tuple[str, ...] | None = None
    score_scale: Annotated[float, Field(gt=0)] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ColBERTSettings:
        """Reads `to_dict`'s form; keys of later versions are ignored. Raises ValueError for a value of another type or
        out of its range."""
        try:
            return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            raise ValueError(first_mistake(error)) from None
