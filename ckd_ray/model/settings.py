"""The settings of a ColBERT model: what must be the same wherever its embeddings are made or compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Similarity = Literal["l2", "cosine"]
_KINDS: dict[str, type] = {
    "dim": int,
    "query_maxlen": int,
    "doc_maxlen": int,
    "mask_punctuation": bool,
    "attend_to_mask": bool,
    "query_expansion": bool,
    "training_expansion": bool,
}


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

    dim: int = 128
    query_maxlen: int = 32
    doc_maxlen: int = 180
    mask_punctuation: bool = True
    similarity: Similarity = "l2"
    query_marker: str = "[unused0]"
    doc_marker: str = "[unused1]"
    attend_to_mask: bool = False
    query_expansion: bool = True
    training_expansion: bool = False
    skip_tokens: tuple[str, ...] | None = None
    score_scale: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ColBERTSettings:
        """Reads `to_dict`'s form; keys of later versions are ignored. Raises ValueError for a value of another type."""
        known = {f.name for f in fields(cls)}
        chosen = {key: value for key, value in values.items() if key in known}
        for key, value in chosen.items():
            kind = _KINDS.get(key, str)
            if key in ("skip_tokens", "score_scale"):
                continue
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise ValueError(f"{key} is {value!r:.60}, expected {kind.__name__}")
        if chosen.get("similarity", "l2") not in get_args(Similarity):
            raise ValueError(f"similarity is {chosen['similarity']!r:.60}, expected l2 or cosine")
        if chosen.get("dim", 1) < 1 or min(chosen.get("query_maxlen", 3), chosen.get("doc_maxlen", 3)) < 3:
            raise ValueError(
                "dim is 1 or more; query_maxlen and doc_maxlen are 3 or more, for [CLS], a marker and [SEP]"
            )
        scale = chosen.get("score_scale")
        if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0):
            raise ValueError(f"score_scale is {scale!r:.60}, expected a number above 0")
        if chosen.get("skip_tokens") is not None:
            chosen["skip_tokens"] = tuple(str(token) for token in chosen["skip_tokens"])
        return cls(**chosen)
