"""BM25 of chosen (query, passage) pairs, from statistics of the whole collection.

No index is built. The statistics hold the document frequencies of the words of the training queries alone.
They are counted in Ray tasks, and the scores equal those of the BM25 baseline (Lucene's variant of the formula).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ckd_ray.data.collection import Collection, collection_once
from ckd_ray.evaluate.bm25 import K1, B, words
from ckd_ray.files import exists, join, read_json, write_json_atomic
from ckd_ray.ray_util.parts import query_spans, run_parts

STATISTICS = "statistics.json"
_PASSAGES_A_TASK = 1 << 16


@dataclass(frozen=True)
class Statistics:
    """passages: how many there are; mean_length: of a passage, in words; frequencies: word -> passages that hold it."""

    passages: int
    mean_length: float
    frequencies: dict[str, int]

    def scores(self, query: Sequence[str], passages: Sequence[Sequence[str]]) -> npt.NDArray[np.float32]:
        """The scores of passages, given as words, for a query, given as words (a repeated word counts repeatedly)."""
        wanted = [(word, self.frequencies.get(word, 0)) for word in query]
        found = np.zeros(len(passages), np.float32)
        for i, passage in enumerate(passages):
            counts = Counter(passage)
            norm = K1 * (1 - B + B * len(passage) / max(self.mean_length, 1e-9))
            found[i] = sum(
                np.log1p((self.passages - df + 0.5) / (df + 0.5)) * counts[word] / (counts[word] + norm)
                for word, df in wanted
                if counts[word]
            )
        return found


def collection_statistics(run: str, folder: str) -> Statistics:
    """Count the words of the training queries in the corpus of `run`, in Ray tasks, unless `folder` has them."""
    path = join(folder, STATISTICS)
    if not exists(path):
        collection = Collection.open(run)
        vocabulary = frozenset(word for text in collection.queries("train").texts for word in words(text))
        spans = query_spans(collection.num_passages, _PASSAGES_A_TASK)
        total, length = Counter[str](), 0
        for row in run_parts(list(range(len(spans))), spans, _count, {"run": run, "vocabulary": vocabulary}):
            total.update(dict(zip(row["words"], map(int, row["passages"]), strict=True)))
            length += int(row["length"])
        mean = length / max(1, collection.num_passages)
        frequencies = dict(sorted(total.items()))
        write_json_atomic(path, {"passages": collection.num_passages, "mean_length": mean, "frequencies": frequencies})
    return Statistics(**read_json(path))


def _count(batch: dict[str, Any], run: str, vocabulary: frozenset[str]) -> pa.Table:
    """The words of some passages that are in the vocabulary, the passages that hold each, and all words counted."""
    start, stop = (int(batch[name][0]) for name in ("first", "stop"))
    found, length = Counter[str](), 0
    for _, texts in collection_once(run).text_blocks(start, stop):
        for text in texts:
            passage = words(text)
            length += len(passage)
            found.update(vocabulary.intersection(passage))
    counted = {"words": [list(found)], "passages": [list(found.values())], "length": [length]}
    lists = {"words": pa.list_(pa.string()), "passages": pa.list_(pa.int64()), "length": pa.int64()}
    return pa.table(counted, pa.schema(lists))
