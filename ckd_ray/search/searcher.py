"""Search of a finished run: encode the query, score the store or an index's candidates, and match the query's tokens
with those of a passage.

Shapes: Q query rows, L passage rows, D dimensions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ckd_ray.arrays import IntArray
from ckd_ray.data import Collection
from ckd_ray.errors import UserError, first_line
from ckd_ray.files import local_copy
from ckd_ray.model import ColBERT
from ckd_ray.model.encoder import TextEncoder
from ckd_ray.model.tokenizer import ColBERTTokenizer
from ckd_ray.runs.finished import FinishedRun, reading
from ckd_ray.search.index import SearchIndex
from ckd_ray.search.scan import scan, score_chosen, winners
from ckd_ray.search.stored import stored_passages

IndexUse = Literal["make", "use", "none"]
# Passages of an index's estimates that are scored exactly.
_LEAST_CANDIDATES, _CANDIDATES_A_RESULT = 1024, 16


@dataclass(frozen=True)
class Match:
    """A query token and the passage token with the highest similarity to it.

    Attributes:
        start, end: characters of the passage token in the text, equal for a token without any ([CLS], [D], [SEP]).
        similarity: the inner product of their embeddings.
    """

    query_token: str
    passage_token: str
    start: int
    end: int
    similarity: float


@dataclass(frozen=True)
class Hit:
    """A found passage. `matches` has an entry for each real token of the query, in their order."""

    rank: int
    passage_id: str
    score: float
    text: str
    matches: list[Match]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Searcher:
    """Answers queries with a run's student (or teacher) and its store.

    A query reads the whole store, or scores the best candidates of an index exactly.

    Args:
        index: `make` one where there is none, `use` one where there is one, or `none`.

    Raises:
        UserError: the run cannot be searched, or the index cannot be made.
    """

    def __init__(self, run: FinishedRun, system: str = "student", *, index: IndexUse = "use") -> None:
        self.store = stored_passages(run, system)
        self.index = None if index == "none" else self._index(run.paths.search_index(system), index)
        with reading(run.paths.folder):
            self.collection = Collection.open(run.paths.root)
        with local_copy(run.paths.checkpoint(system)) as local:
            self.encoder = TextEncoder(ColBERT.from_pretrained(local))

    def _index(self, folder: str, use: IndexUse) -> SearchIndex | None:
        if use == "use":
            return SearchIndex.open(folder, self.store)
        try:
            return SearchIndex.make(folder, self.store)
        except OSError as error:
            raise UserError("the index cannot be written", where=folder, found=first_line(error)) from error

    def search(self, query: str, top: int = 10) -> list[Hit]:
        """The best `top` passages."""
        encoded = self.encoder.queries([query])
        rows_QD = encoded.embeddings_TD
        if self.index is None:
            scores, passages = scan(self.store, rows_QD, top)
        else:
            candidates = self.index.candidates(rows_QD, max(_LEAST_CANDIDATES, _CANDIDATES_A_RESULT * top))
            scores, passages = score_chosen(self.store, candidates, rows_QD, top)
        tokenizer = self.encoder.model.tokenizer
        real, query_tokens = _real_tokens(tokenizer, query)
        found = self.store.gather(passages)
        rows = zip(
            scores.tolist(),
            self.collection.passage_ids(passages),
            self.collection.texts(passages),
            found.split(),
            np.split(found.token_ids, np.cumsum(found.lengths)[:-1]),
            strict=True,
        )
        hits = []
        for rank, (score, passage_id, text, rows_LD, token_ids) in enumerate(rows, 1):
            at, similarity = winners(rows_LD, encoded.embeddings_TD)
            spans = token_spans(tokenizer, text, token_ids)
            names = tokenizer.hf.convert_ids_to_tokens(token_ids.tolist())
            matches = [
                Match(token, names[at[i]], spans[at[i]][0], spans[at[i]][1], float(similarity[i]))
                for i, token in zip(real, query_tokens, strict=True)
                if at[i] >= 0
            ]
            hits.append(Hit(rank, passage_id, score, text, matches))
        return hits


def _real_tokens(tokenizer: ColBERTTokenizer, query: str) -> tuple[list[int], list[str]]:
    """The rows of the query's own words (not of markers or [MASK]), and their tokens."""
    ids = tokenizer.queries([query])[0][0].numpy()
    real = np.flatnonzero(~np.isin(ids, tokenizer.special_token_ids) & tokenizer.keeps(ids.astype(np.int32)))
    return real.tolist(), tokenizer.hf.convert_ids_to_tokens(ids[real].tolist())


def token_spans(tokenizer: ColBERTTokenizer, text: str, token_ids: IntArray) -> list[tuple[int, int]]:
    """Characters (start, end) of every stored row of a passage; (0, 0) for markers.

    All are (0, 0) where the text does not give the stored tokens, because the corpus changed after the embedding.
    """
    head = [tokenizer.cls_id, *([] if tokenizer.doc_marker_id is None else [tokenizer.doc_marker_id])]
    encoded = tokenizer.hf(
        text,
        add_special_tokens=False,
        truncation=True,
        max_length=tokenizer.settings.doc_maxlen - len(head) - 1,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    ids = np.array([*head, *encoded["input_ids"], tokenizer.sep_id], np.int32)
    spans = [*((0, 0) for _ in head), *((int(a), int(b)) for a, b in encoded["offset_mapping"]), (0, 0)]
    kept = tokenizer.keeps(ids)
    if not np.array_equal(ids[kept], token_ids):
        return [(0, 0)] * len(token_ids)
    return [span for span, keep in zip(spans, kept.tolist(), strict=True) if keep]
