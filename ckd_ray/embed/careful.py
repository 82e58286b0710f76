"""A text on which the encoder fails every time: found, named, and kept from being tried for ever.

An error that the encoder raises is looked into at once, a range of texts at a time. A process that dies without a word
(a segmentation fault, the kernel's or Ray's out-of-memory killer) cannot look into anything, and Ray starts it again
without end; so every try is written down beside the shard before it begins. After `_TRIES` deaths the next process
encodes the shard in halves, notes which range it is at, and so on until the range is one text. A text is called bad
when it has failed alone; the shard is then encoded once more, whole but for the bad ones, so what comes out depends on
the texts and not on what died in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ckd_ray.errors import JobError, UserError
from ckd_ray.files import delete, exists, read_object, write_json_atomic
from ckd_ray.ray_util.processes import leave_a_lost_gpu

if TYPE_CHECKING:
    from ckd_ray.model.encoder import Encoded

# Deaths before a shard is looked into, and deaths of one text alone before it is called bad: nodes are lost as well.
_TRIES, _TRIES_ALONE = 3, 2
# Deaths in all before a shard is given up: to find one text of 16,384 takes 15, and each further one as many.
_MOST_TRIES = 200
TRIES = ".tries.json"

Encode = Callable[[list[int]], "Encoded"]


@dataclass
class Tries:
    """What is known of a shard whose encoder has failed, as it stands beside the shard.

    Attributes:
        deaths: tries that began and did not end. `ranges`: [first, stop) still to be looked at, the first one now.
        alone: text -> deaths of the process that encoded it alone. bad: text -> what happened, in the order found.
        looking: ranges are being looked at; else the shard as a whole.
    """

    deaths: int = 0
    looking: bool = False
    ranges: list[list[int]] = field(default_factory=list)
    alone: dict[str, int] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_file(cls, uri: str) -> Tries:
        """What an earlier process has left, having died; nothing when there is no file."""
        return cls(**read_object(uri)) if exists(uri) else cls()


class CarefulEncoder:
    """Encodes the texts of one shard.

    Args:
        uri: the file of tries, which is removed when all went well.
        count: N, texts of the shard.
        encode: encodes some of them, by number; raises, or ends the process.
        called: the shard's name, for messages.
    """

    def __init__(self, uri: str, count: int, encode: Encode, called: str) -> None:
        self.uri, self.count, self.encode, self.called = uri, count, encode, called
        self.tries = Tries.of_file(uri)

    def run(self) -> tuple[Encoded, dict[int, str]]:
        """The texts that could be encoded, in order, and what happened to the others, by number.

        Raises:
            JobError: the shard fails as a whole though none of its texts fails alone.
        """
        self._count_death()
        try:
            if self.tries.looking:
                self._look()
            return self._whole(), {int(text): cause for text, cause in self.tries.bad.items()}
        except Exception:
            delete(self.uri)  # it ended with a word, so nobody has died
            raise

    def done(self) -> None:
        """The shard is written."""
        delete(self.uri)

    def _count_death(self) -> None:
        tries = self.tries
        if exists(self.uri):
            tries.deaths += 1
            if tries.deaths >= _MOST_TRIES:
                delete(self.uri)
                raise JobError(
                    f"{self.called}: its encoder has died {tries.deaths} times, and on no text alone; if it is for want"
                    " of memory, lower embed.token_budget or embed.passages_per_shard"
                )
            if tries.looking:
                self._blame(tries.ranges[0], "the encoder's process dies on it")
            elif tries.deaths >= _TRIES:
                tries.looking, tries.ranges = True, [[0, self.count]]
        self._keep()

    def _keep(self) -> None:
        write_json_atomic(self.uri, asdict(self.tries))

    def _blame(self, span: list[int], cause: str, *, again: bool = True) -> None:
        """The first range has failed: halve it, or call its one text bad when it has failed often enough."""
        tries, (first, stop) = self.tries, span
        if stop - first > 1:
            middle = (first + stop) // 2
            tries.ranges[:1] = [[first, middle], [middle, stop]]
            return
        name = str(first)
        tries.alone[name] = tries.alone.get(name, 0) + 1
        if not again or tries.alone[name] >= _TRIES_ALONE:
            tries.bad[name] = cause
            tries.ranges.pop(0)

    def _look(self) -> None:
        """Encode range after range; what comes of it is thrown away."""
        tries = self.tries
        while tries.ranges:
            self._keep()
            try:
                self.encode(list(range(*tries.ranges[0])))
            except (UserError, JobError, OSError):
                raise
            except Exception as error:  # whatever a model may raise on a text
                leave_a_lost_gpu()
                self._blame(tries.ranges[0], _said(error), again=False)
            else:
                tries.ranges.pop(0)
        tries.looking = False
        self._keep()

    def _whole(self) -> Encoded:
        """All texts but the bad ones; when that fails, it is looked into, once."""
        for looked in (False, True):
            good = [i for i in range(self.count) if str(i) not in self.tries.bad]
            try:
                return self.encode(good)
            except (UserError, JobError, OSError):
                raise
            except Exception as error:  # whatever a model may raise on a text
                leave_a_lost_gpu()
                if looked:
                    raise JobError(
                        f"{self.called}: the encoder fails on its {len(good)} texts together, though on none of them"
                        f" alone ({_said(error)}); if it is for want of memory, lower embed.token_budget or"
                        " embed.passages_per_shard"
                    ) from error
            # Not in the block above, where the error keeps what its batch holds on a GPU.
            self.tries.looking, self.tries.ranges = True, [[0, self.count]]
            self._look()
        raise AssertionError


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def with_gaps(encoded: Encoded, count: int, bad: dict[int, str]) -> Encoded:
    """The same rows for `count` texts, of which the bad ones have none."""
    from ckd_ray.model.encoder import Encoded

    if not bad:
        return encoded
    lengths = np.zeros(count, np.int32)
    lengths[[i for i in range(count) if i not in bad]] = encoded.lengths
    return Encoded(lengths, encoded.token_ids, encoded.embeddings_TD)
