"""BM25 of chosen (query, passage) pairs, from statistics of the whole collection.

No index is built: the statistics count, for the words of the training queries alone, in how many passages each stands.
They are counted in Ray tasks, and the scores equal those of the BM25 baseline (Lucene's variant of the formula).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from ckd_ray.data.collection import Collection, collection_once
from ckd_ray.evaluate.bm25 import K1, B, words
from ckd_ray.files import exists, join, read_json, write_json_atomic

STATISTICS = "statistics.json"
_PASSAGES_A_TASK = 1 << 16
_PASSAGES_A_READ = 8192
_TASKS_AT_ONCE = 64


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


def collection_statistics(run: str, folder: str, split: str = "train") -> Statistics:
    """Count the words of the queries of `split` in the corpus of `run`, in Ray tasks, unless `folder` has them."""
    path = join(folder, STATISTICS)
    if not exists(path):
        collection = Collection.open(run)
        vocabulary = ray.put(frozenset(word for text in collection.queries(split).texts for word in words(text)))
        task = ray.remote(num_cpus=1)(_count)
        bounds = range(0, collection.num_passages, _PASSAGES_A_TASK)
        total, length, pending = Counter[str](), 0, list[Any]()
        for start in (*bounds, None):
            if start is not None:
                pending.append(
                    task.remote(run, vocabulary, start, min(start + _PASSAGES_A_TASK, collection.num_passages))
                )
            while pending and (start is None or len(pending) >= _TASKS_AT_ONCE):
                (ready,), pending = ray.wait(pending, num_returns=1)
                counts, counted = ray.get(ready)
                total.update(counts)
                length += counted
        mean = length / max(1, collection.num_passages)
        write_json_atomic(
            path, {"passages": collection.num_passages, "mean_length": mean, "frequencies": dict(sorted(total.items()))}
        )
    return Statistics(**read_json(path))


def _count(run: str, vocabulary: frozenset[str], start: int, stop: int) -> tuple[dict[str, int], int]:
    """(word -> passages that hold it, words in all) of the passages [start, stop)."""
    collection, found, length = collection_once(run), Counter[str](), 0
    for first in range(start, stop, _PASSAGES_A_READ):
        for text in collection.iter_passages(first, min(first + _PASSAGES_A_READ, stop)):
            passage = words(text)
            length += len(passage)
            found.update(vocabulary.intersection(passage))
    return dict(found), length
