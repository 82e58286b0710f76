"""A text that fails every time is found and named within a bounded number of deaths; an innocent one never is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_ray.embed import bad_texts
from ckd_ray.embed.bad_texts import MOST_TRIES, GuardedEncoder, with_empty_texts
from ckd_ray.errors import JobError
from ckd_ray.model.encoder import Encoded


class Died(BaseException):
    """Stands for a process that is gone: nothing after it runs, what is on the disk stays."""


class Model:
    """Encodes text i as one row of i; `die` and `fail` say on which calls it does not."""

    def __init__(self, die: Callable[[list[int]], bool], fail: Callable[[list[int]], bool] = lambda _: False) -> None:
        self.die, self.fail, self.calls = die, fail, list[list[int]]()

    def __call__(self, some: list[int]) -> Encoded:
        self.calls.append(some)
        if self.die(some):
            raise Died
        if self.fail(some):
            raise RuntimeError("no such token")
        count = len(some)
        return Encoded(np.ones(count, np.int32), np.array(some, np.int32), torch.zeros(count, 2, dtype=torch.float16))


def until_done(path: Path, model: Model, count: int) -> tuple[Encoded, dict[int, str], int]:
    """Start a process again and again; what comes out, and how many died."""
    for deaths in range(10 * MOST_TRIES):
        encoder = GuardedEncoder(str(path), count, model, "shard 7")
        try:
            encoded, bad = encoder.run()
        except Died:
            assert path.exists()
            continue
        encoder.done()
        return encoded, bad, deaths
    raise AssertionError("tried for ever")


@pytest.mark.parametrize("bad", [[5], [0], [1023], [3, 4], [0, 511, 1023]])
def test_texts_that_end_the_process_are_found(tmp_path: Path, bad: list[int]) -> None:
    model = Model(die=lambda some: any(i in some for i in bad))
    encoded, found, deaths = until_done(tmp_path / "tries.json", model, 1024)
    assert list(found) == bad and set(found.values()) == {"the encoder's process dies on it"}
    assert deaths <= 3 + len(bad) * (10 + 2)
    # What comes out is one whole encoding of the others, as if nothing had died in between.
    good = [i for i in range(1024) if i not in bad]
    assert model.calls[-1] == good and encoded.token_ids.tolist() == good
    assert not list(tmp_path.iterdir())


def test_ranges_are_tried_from_the_first_death_on_where_that_is_asked_for(tmp_path: Path) -> None:
    """A training that asks has failed twice before."""
    model = Model(die=lambda some: 5 in some)
    path, deaths = tmp_path / "tries.json", 0
    while True:
        encoder = GuardedEncoder(str(path), 64, model, "step 7", together=1)
        try:
            bad = encoder.run()[1]
            break
        except Died:
            deaths += 1
    assert list(bad) == [5] and deaths == 1 + 5 + 2  # all of them, ranges of 32 to 2, the text twice


@pytest.mark.parametrize("bad", [[5], [0, 63], []])
def test_texts_on_which_the_encoder_raises_are_found_at_once(tmp_path: Path, bad: list[int]) -> None:
    model = Model(die=lambda _: False, fail=lambda some: any(i in some for i in bad))
    encoded, found, deaths = until_done(tmp_path / "tries.json", model, 64)
    assert deaths == 0 and found == dict.fromkeys(bad, "RuntimeError: no such token")
    assert encoded.token_ids.tolist() == [i for i in range(64) if i not in bad]
    assert len(model.calls) <= 2 + 14 * len(bad) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("deaths", [[0], [0, 1], [0, 1, 2, 3, 4, 6, 9]])
def test_a_process_lost_by_chance_blames_no_text(tmp_path: Path, deaths: list[int]) -> None:
    """Nodes are lost as well: a text is bad when it fails again alone, not because something died near it."""
    model = Model(die=lambda some: len(model.calls) - 1 in deaths)
    encoded, found, died = until_done(tmp_path / "tries.json", model, 16)
    assert found == {} and died == len(deaths) and model.calls[-1] == list(range(16)) == encoded.token_ids.tolist()


def test_texts_that_fail_together_only(tmp_path: Path) -> None:
    model = Model(die=lambda _: False, fail=lambda some: len(some) > 4)
    with pytest.raises(JobError, match=r"shard 7: the encoder fails on its 16 texts together.*embed.token_budget"):
        until_done(tmp_path / "tries.json", model, 16)
    assert not list(tmp_path.iterdir())


def test_a_shard_on_which_every_process_dies_is_given_up(tmp_path: Path) -> None:
    model = Model(die=lambda some: len(some) > 4)  # together only, as for want of memory
    with pytest.raises(JobError, match=r"shard 7: its encoder has died \d+ times.*lower embed.token_budget"):
        until_done(tmp_path / "tries.json", model, 16)
    assert len(model.calls) <= 4 * MOST_TRIES and not list(tmp_path.iterdir())


def test_gaps() -> None:
    encoded = Encoded(np.array([2, 3], np.int32), np.arange(5, dtype=np.int32), torch.zeros(5, 2))
    assert with_empty_texts(encoded, 4, {0: "x", 2: "y"}).lengths.tolist() == [0, 2, 0, 3]
    assert with_empty_texts(encoded, 2, {}) is encoded


class Full(Model):
    """The GPU has no memory for some texts in the first `times` calls that have one of them."""

    def __init__(self, texts: list[int], times: int) -> None:
        super().__init__(die=lambda _: False)
        self.texts, self.times = texts, times

    def __call__(self, some: list[int]) -> Encoded:
        if self.times and any(i in some for i in self.texts):
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().__call__(some)


def test_a_gpu_without_memory_brands_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_texts, "_MEMORY_PAUSE_S", 0.0)
    encoded, bad, _ = until_done(tmp_path / "tries.json", Full([5], times=1), 16)
    assert not bad and encoded.token_ids.tolist() == list(range(16))
    model = Full([5], times=1000)
    with pytest.raises(JobError, match=r"memory does not hold one text alone \(CUDA out of memory"):
        until_done(tmp_path / "tries.json", model, 16)
    assert model.times == 998 and not list(tmp_path.iterdir()), "two tries, nothing recorded"


def test_a_gpu_without_memory_while_a_bad_text_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text that fails is found; the one that met a full GPU is not branded beside it."""
    monkeypatch.setattr(bad_texts, "_MEMORY_PAUSE_S", 0.0)

    class Both(Full):
        def __call__(self, some: list[int]) -> Encoded:
            if 9 in some:
                raise RuntimeError("no such token")
            return super().__call__(some)

    encoded, bad, _ = until_done(tmp_path / "tries.json", Both([5], times=1), 16)
    assert list(bad) == [9] and encoded.token_ids.tolist() == [i for i in range(16) if i != 9]
