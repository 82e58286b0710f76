"""Finds the texts on which the encoder fails every time, so that the others of a shard are still encoded.

Training finds those of a step in the same way (distill/suspects.py).

When the encoder raises an error, ranges of texts are tried at once. A process that dies (a segmentation fault, the
out-of-memory killer of the kernel or of Ray) cannot try anything, and Ray starts it again without end. Every try is
therefore recorded in a file next to the shard before it begins. After `_TRIES` deaths the next process encodes the
shard in halves and records the range it is at, and so on until the range is one text. A text is bad when it has failed
alone. The shard is then encoded once more without the bad texts, so the result depends on the texts and not on what
died.

A GPU without memory is no fault of a text: the encoder tries smaller batches, and one text alone that does not fit ends
the stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ckd_ray.errors import JobError, UserError, described, first_line
from ckd_ray.files import delete, exists, read_object, write_json_atomic
from ckd_ray.model.length_buckets import free_gpu_memory
from ckd_ray.ray_util.processes import leave_a_lost_gpu

if TYPE_CHECKING:
    from ckd_ray.model.encoder import Encoded

# Deaths before ranges are tried, and deaths of one text alone before it is bad: a lost node counts as a death as well.
_TRIES, _TRIES_ALONE = 3, 2
# Deaths before the shard fails: finding one text of 16,384 takes 15, and each further one as many.
MOST_TRIES = 200
TRIES = ".tries.json"
# After an out-of-memory, before the only other try: another process may hold the memory for a moment.
_MEMORY_PAUSE_S = 10.0
_LESS_MEMORY = "if memory is short, lower embed.token_budget or embed.passages_per_shard"

Encode = Callable[[list[int]], Any]
# A bad passage: index, passage_id, cause.
Entry = dict[str, Any]


@dataclass
class _Tries:
    """The recorded tries of a shard.

    Attributes:
        deaths: tries that began and did not end.
        looking: ranges are tried; else the whole shard.
        ranges: [first, stop) still to be tried; the first one is being tried.
        alone: text -> deaths of the process that encoded it alone.
        bad: text -> what happened, in the order found.
    """

    deaths: int = 0
    looking: bool = False
    ranges: list[list[int]] = field(default_factory=list)
    alone: dict[str, int] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)


class GuardedEncoder:
    """Encodes the texts of one shard.

    Args:
        uri: the file of tries, removed when the shard is written.
        count: N, texts of the shard.
        encode: encodes some of them, by number; raises, or ends the process.
        shard: its name, for messages.
        together: deaths on all texts together before ranges are tried.
    """

    def __init__(self, uri: str, count: int, encode: Encode, shard: str, together: int = _TRIES) -> None:
        self.uri, self.count, self.encode, self.shard, self.together = uri, count, encode, shard, together
        # What a process that died has left.
        self.tries = _Tries(**read_object(uri)) if exists(uri) else _Tries()

    def run(self) -> tuple[Any, dict[int, str]]:
        """What `encode` returns for the texts that it can encode, and what happened to the others, by number.

        Raises:
            JobError: the shard fails although none of its texts fails alone.
        """
        self._count_death()
        try:
            if self.tries.looking:
                self._try_ranges()
            return self._encode_good(), {int(text): cause for text, cause in self.tries.bad.items()}
        except Exception:
            delete(self.uri)  # the process raises an error, so the next one has no death to count
            raise

    def done(self) -> None:
        """Call when the shard is written."""
        delete(self.uri)

    def _count_death(self) -> None:
        tries = self.tries
        if exists(self.uri):
            tries.deaths += 1
            if tries.deaths >= MOST_TRIES:
                delete(self.uri)
                raise JobError(
                    f"{self.shard}: its encoder has died {tries.deaths} times, and on no text alone; {_LESS_MEMORY}"
                )
            if tries.looking:
                self._range_failed("the encoder's process dies on it", most=_TRIES_ALONE)
            elif tries.deaths >= self.together:
                tries.looking, tries.ranges = True, [[0, self.count]]
                if self.count > 1:
                    self._range_failed("", most=_TRIES_ALONE)  # the whole shard was tried; this halves it
        self._record()

    def _record(self) -> None:
        write_json_atomic(self.uri, asdict(self.tries))

    def _range_failed(self, cause: str, *, most: int) -> None:
        """Halve the range that is being tried; its one text is bad when it has failed `most` times."""
        tries, (first, stop) = self.tries, self.tries.ranges[0]
        if stop - first > 1:
            middle = (first + stop) // 2
            tries.ranges[:1] = [[first, middle], [middle, stop]]
            return
        tries.alone[str(first)] = tries.alone.get(str(first), 0) + 1
        if tries.alone[str(first)] >= most:
            tries.bad[str(first)] = cause
            tries.ranges.pop(0)

    def _try_ranges(self) -> None:
        """Encode range after range; the embeddings are dropped."""
        tries = self.tries
        while tries.ranges:
            self._record()
            try:
                self._encode(list(range(*tries.ranges[0])))
            except (UserError, JobError, OSError):
                raise
            except Exception as error:  # a model may raise anything on a text
                leave_a_lost_gpu()
                self._range_failed(described(error)[:300], most=1)
            else:
                tries.ranges.pop(0)
        tries.looking = False
        self._record()

    def _encode(self, some: list[int]) -> Any:
        """`encode`, once more when the GPU's memory did not hold one text alone.

        Raises:
            JobError: it does not hold it this time either.
        """
        for last in (False, True):
            try:
                return self.encode(some)
            except torch.OutOfMemoryError as error:
                if last:
                    raise JobError(
                        f"{self.shard}: the GPU's memory does not hold one text alone ({first_line(error)}); end other"
                        " processes on the GPU (nvidia-smi shows them), set embed.gpus_per_actor: 1, or lower"
                        " model.doc_maxlen"
                    ) from None
            free_gpu_memory()
            time.sleep(_MEMORY_PAUSE_S)
        raise AssertionError

    def _encode_good(self) -> Any:
        """All texts but the bad ones; when that fails, ranges are tried, once."""
        for tried in (False, True):
            good = [i for i in range(self.count) if str(i) not in self.tries.bad]
            try:
                return self._encode(good)
            except (UserError, JobError, OSError):
                raise
            except Exception as error:  # a model may raise anything on a text
                leave_a_lost_gpu()
                if tried:
                    raise JobError(
                        f"{self.shard}: the encoder fails on its {len(good)} texts together, though on none of them"
                        f" alone ({described(error)[:300]}); {_LESS_MEMORY}"
                    ) from error
            # Not in the block above, where the error keeps the batch's memory on a GPU.
            self.tries.looking, self.tries.ranges = True, [[0, self.count]]
            self._try_ranges()
        raise AssertionError


def with_empty_texts(encoded: Encoded, count: int, bad: dict[int, str]) -> Encoded:
    """The same rows for `count` texts, of which the bad ones have no rows."""
    from ckd_ray.model.encoder import Encoded

    if not bad:
        return encoded
    lengths = np.zeros(count, np.int32)
    lengths[[i for i in range(count) if i not in bad]] = encoded.lengths
    return Encoded(lengths, encoded.token_ids, encoded.embeddings_TD)


def named(entries: Sequence[Entry]) -> str:
    """The first twenty of them, each with its cause."""
    return "; ".join(f"{entry['passage_id']} ({entry['cause']})" for entry in entries[:20])


def too_many(texts: str, entries: Sequence[Entry], allowed: int) -> str:
    """The message when more of the `texts` (`passages`, or `queries.SPLIT`) are bad than are `allowed`."""
    failed = f"the encoder fails every time on {len(entries)}"
    if texts != "passages":
        return f"{failed} of {texts}: {named(entries)}; leave it out, or correct its text"
    return (
        f"{failed} passages, and {allowed} may be left out (embed.max_bad_passages): {named(entries)};"
        " correct or leave out these passages, or raise embed.max_bad_passages"
    )
