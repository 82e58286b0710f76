"""BM25 by bm25s: an index of the passages, and a ranking for every evaluation query.

bm25s builds its index in memory: about 1 KiB a passage of 60 words, and several times that during the build. So it runs
in a Ray task of its own, never on the driver. It is the only part of an evaluation whose memory grows with the
collection; `evaluate.bm25_passages` limits it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np

from ckd_ray.data import Collection
from ckd_ray.files import join, make_folder
from ckd_ray.ray_util.parts import part_file, query_spans
from ckd_ray.retrieve.rankings import write_ranking_part

K1, B = 1.5, 0.75  # bm25s' own defaults, in Lucene's variant of the formula
_WORD = re.compile(r"(?u)\b\w\w+\b")


@lru_cache(maxsize=1)
def _stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN

    return frozenset(STOPWORDS_EN)


def words(text: str) -> list[str]:
    """Lower-case words of two letters or more, without English stop words; no stemming."""
    return [word for word in _WORD.findall(text.lower()) if word not in _stop_words()]


def rank_bm25(run: str, splits: list[str], out: str, depth: int) -> dict[str, Any]:
    """Rank the queries of `splits` in one process, and write the rankings into `out` in the form of the retrieve stage.

    Equal scores are ordered by passage index. Returns figures for the manifest.
    """
    import bm25s

    collection = Collection.open(run)
    vocabulary: dict[str, int] = {}
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    corpus = _corpus(collection, vocabulary)
    if vocabulary:  # bm25s fails on a collection without any word; nothing is found in it
        index.index((corpus, vocabulary), show_progress=False)
    make_folder(out)
    for split in splits:
        queries = collection.queries(split)
        for part, (first, stop) in enumerate(query_spans(len(queries.ids))):
            ranked = [_rank(index, vocabulary, text, depth) for text in queries.texts[first:stop]]
            scores_BK, passages_BK = (np.stack([r[i] for r in ranked]) for i in (0, 1))
            write_ranking_part(
                join(out, part_file(split, part)),
                first_query=first,
                query_ids=queries.ids[first:stop],
                scores_BK=scores_BK.astype(np.float32),
                passages_BK=passages_BK,
                passage_ids=collection.passage_ids(passages_BK[passages_BK >= 0]),
            )
    return {"vocabulary": len(vocabulary), "k1": K1, "b": B}


def _corpus(collection: Collection, vocabulary: dict[str, int]) -> list[list[int]]:
    """The word numbers of every passage; new words get the next number in `vocabulary`."""
    found: list[list[int]] = []
    for _, texts in collection.text_blocks():
        found += [[vocabulary.setdefault(word, len(vocabulary)) for word in words(text)] for text in texts]
    return found


def _rank(index: Any, vocabulary: dict[str, int], text: str, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores_K, passages_K), highest first; a passage without a word of the query is not a result."""
    scores, passages = np.full(depth, -np.inf, np.float32), np.full(depth, -1, np.int64)
    known = [vocabulary[word] for word in words(text) if word in vocabulary]
    if known:
        found = np.asarray(index.get_scores_from_ids(known))
        positive = np.flatnonzero(found > 0)
        if len(positive) > depth:  # sorting all would take longer than scoring; ties with the last result stay
            least = np.partition(found[positive], len(positive) - depth)[len(positive) - depth]
            positive = positive[found[positive] >= least]
        order = positive[np.lexsort((positive, -found[positive]))][:depth]
        scores[: len(order)], passages[: len(order)] = found[order], order
    return scores, passages
