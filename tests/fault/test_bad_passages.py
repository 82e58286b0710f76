"""Passages on which the encoder raises, or dies, every time: found, named, set aside, and not tried for ever."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckd_ray.config import EmbedConfig
from ckd_ray.embed.stream import EmbedJob, embed_texts, plan_shards
from ckd_ray.errors import JobError
from ckd_ray.model.colbert import load_tokenizer
from ckd_ray.model.encoder import Encoded
from ckd_ray.store import EmbeddingStore, shard_name
from tests.fault.stand_in import StandIn, contents, identity, job_of, make_encoder, prepare_run

SPANS = plan_shards(60, 10)


class Fragile(StandIn):
    """Fails on some passages (their token ids in hexadecimal): by an error, or by the end of its process."""

    def __init__(self, calls: str, bad: dict[str, str]) -> None:
        super().__init__(calls, 0)
        self.bad = bad

    def passages(self, tokens: Sequence[Any]) -> Encoded:
        for ids in tokens:
            way = self.bad.get(np.asarray(ids, np.int32).tobytes().hex())
            if way == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if way == "raise":
                raise ZeroDivisionError("a strange token")
        return super().passages(tokens)


def fragile(calls: Path, bad: dict[str, str]) -> Callable[[EmbedJob, int], Fragile]:
    return lambda job, threads: Fragile(str(calls), bad)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> str:
    return prepare_run(tmp_path_factory.mktemp("run"), tiny_backbone, tiny_collection)[0]


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, run: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    embed_texts([(job_of(run, folder), SPANS)], EmbedConfig(), make_encoder=make_encoder(folder.parent / "calls", 0))
    return folder


def tokens_of(run: str, passages: list[int]) -> list[str]:
    from ckd_ray.data import Collection

    found = load_tokenizer(Path(run) / "teacher").passages(Collection.open(run).texts(passages))
    return [ids.tobytes().hex() for ids in found]


def check(store: EmbeddingStore, undisturbed: Path, bad: list[int], cause: str) -> None:
    """Every passage but the bad ones has the rows of an undisturbed run; passages in = passages out + set aside."""
    before, after = (s.gather(np.arange(60)) for s in (EmbeddingStore.open(str(undisturbed)), store))
    for i, (one, other) in enumerate(zip(before.split(), after.split(), strict=True)):
        assert len(other) == 0 if i in bad else (one == other).all(), i
    named = [{"index": i, "passage_id": f"p{i}", "cause": cause} for i in bad]
    assert store.manifest["set_aside"] == named and store.num_passages == 60
    assert int((store.lengths() > 0).sum()) + len(named) == 60 and store.verify() == []
    untouched = [shard_name(i) for i in range(6) if not any(i == b // 10 for b in bad)]
    assert all((Path(store.uri) / name).read_bytes() == contents(undisturbed)[name] for name in untouched)
    assert not list(Path(store.uri).glob("*.tries.json"))


def test_passages_on_which_the_encoder_raises(
    undisturbed: Path, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = dict.fromkeys(tokens_of(run, [17, 42]), "raise")
    job, encoder = job_of(run, tmp_path / "store"), fragile(tmp_path / "calls", bad)
    with pytest.raises(
        JobError, match=r"on \d passages, and 0 may be left out .*p(17|42) \(ZeroDivisionError: a strange"
    ):
        embed_texts([(job, SPANS)], EmbedConfig(actors=1), make_encoder=encoder)
    kept = identity(tmp_path / "store")
    store = embed_texts([(replace(job, max_bad=2), SPANS)], EmbedConfig(), make_encoder=encoder)[0]
    check(store, undisturbed, [17, 42], "ZeroDivisionError: a strange token")
    assert {name: identity(tmp_path / "store")[name] for name in kept} == kept
    told = capsys.readouterr().err
    assert "2 passages have no embeddings" in told and "p17 (ZeroDivisionError" in told and "p42" in told
    assert (
        json.loads((tmp_path / "store" / "shard-000004.arrow.set-aside.json").read_text())["passages"][0]["index"] == 42
    )


@pytest.mark.slow
def test_passages_on_which_the_encoder_s_process_dies(undisturbed: Path, run: str, tmp_path: Path) -> None:
    """Ray starts a dead actor again without end; the deaths are counted, and the text is found by halves."""
    bad = dict.fromkeys(tokens_of(run, [33]), "die")
    job = replace(job_of(run, tmp_path / "store"), max_bad=1)
    store = embed_texts([(job, SPANS)], EmbedConfig(), make_encoder=fragile(tmp_path / "calls", bad))[0]
    check(store, undisturbed, [33], "the encoder's process dies on it")
