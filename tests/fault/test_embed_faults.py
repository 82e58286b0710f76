"""No shard lost, none twice: an encoder killed, a node cut off, files broken, the disk full, in mid-embedding."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray

from ckd_ray.config import EmbedConfig
from ckd_ray.embed.stream import embed_texts, plan_shards
from ckd_ray.errors import JobError
from ckd_ray.store import EmbeddingStore, shard_name
from tests.fault.stand_in import Calls, contents, identity, job_of, make_encoder, prepare_run
from tests.support import told_by

SPANS = plan_shards(60, 5)
NAMES = [shard_name(i) for i in range(12)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> str:
    return prepare_run(tmp_path_factory.mktemp("run"), tiny_backbone, tiny_collection)[0]


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, run: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that all others must be equal to, byte by byte."""
    folder = tmp_path_factory.mktemp("undisturbed")
    calls = Calls(folder.parent / "undisturbed-calls")
    embed_texts([(job_of(run, folder), SPANS)], EmbedConfig(), make_encoder=make_encoder(calls.path, 0))
    assert len(calls.started()) == len(set(calls.started())) == 12
    assert sorted(p.name for p in folder.glob("*.arrow")) == NAMES
    return folder


def free_in_the_end(cpus: float, patience_s: float = 30) -> bool:
    """Whether so many CPUs are free, or soon will be."""
    deadline = time.monotonic() + patience_s
    while ray.available_resources().get("CPU", 0) < cpus - 0.01:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_an_encoder_is_killed_in_the_middle_of_a_shard(undisturbed: Path, run: str, tmp_path: Path) -> None:
    out, calls = tmp_path / "store", Calls(tmp_path / "calls")
    seen: dict[str, tuple[int, int]] = {}

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            busy = calls.in_the_middle()
            if busy and len(calls.ended()) >= 3:
                seen.update(identity(out))
                os.kill(busy[0], signal.SIGKILL)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    embed_texts([(job_of(run, out), SPANS)], EmbedConfig(), make_encoder=make_encoder(calls.path, 0.3))
    killer.join()
    assert 1 <= len(seen) < 12, "the kill came at the wrong time to mean anything"
    assert {name: identity(out)[name] for name in seen} == seen
    assert len(set(calls.started())) == 12
    assert len(calls.started()) - len(calls.ended()) == 1 and len(calls.ended()) == 12
    assert contents(out) == contents(undisturbed)


def test_a_node_is_cut_off(undisturbed: Path, run: str, tmp_path: Path) -> None:
    out, calls = tmp_path / "store", Calls(tmp_path / "calls")
    told = told_by("tests.fault.node_loss", run, str(out), str(calls.path))
    assert told["done"] and told["cut_off"] == 1
    assert 1 <= len(told["before"]) < 12
    assert {name: list(identity(out)[name]) for name in told["before"]} == told["before"]
    assert len(set(calls.started())) == len(calls.ended()) == 12 and len(calls.started()) == 13
    assert contents(out) == contents(undisturbed)


@pytest.mark.slow
def test_a_gpu_that_comes_later_is_used_and_one_that_goes_loses_nothing(run: str, tmp_path: Path) -> None:
    out, calls = tmp_path / "store", Calls(tmp_path / "calls")
    told = told_by("tests.fault.gpu_nodes", run, str(out), str(calls.path))
    assert told.pop("left") >= 2, "the node was lost too late to mean anything"
    assert told == {"done": True, "alone": 1, "nodes": True}
    assert len(set(calls.ended())) == 30


def test_broken_shards_of_a_stopped_stage_are_named_and_made_again(
    undisturbed: Path, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, calls = tmp_path / "store", Calls(tmp_path / "calls")
    out.mkdir()
    for name in [*NAMES, "plan.json"]:
        (out / name).write_bytes((undisturbed / name).read_bytes())
    data = {name: bytearray((out / name).read_bytes()) for name in NAMES}
    data[NAMES[1]][len(data[NAMES[1]]) // 2] ^= 8
    (out / NAMES[1]).write_bytes(data[NAMES[1]])
    os.truncate(out / NAMES[3], len(data[NAMES[3]]) - 700)
    (out / NAMES[5]).write_bytes(b"")
    (out / NAMES[6]).write_bytes(data[NAMES[7]])
    (out / NAMES[8]).write_bytes(data[NAMES[8]].replace(b'"fingerprint": "f"', b'"fingerprint": "g"'))
    (out / NAMES[10]).unlink()
    before = identity(out)
    broken = [NAMES[i] for i in (1, 3, 5, 6, 8)]
    embed_texts([(job_of(run, out), SPANS)], EmbedConfig(), make_encoder=make_encoder(calls.path, 0))
    told = capsys.readouterr().err
    assert all(f"{out / name}: " in told for name in broken) and told.count("computed again") == len(broken)
    assert len(calls.started()) == len(set(calls.started())) == 6
    after = identity(out)
    assert {name for name in before if before[name] != after[name]} == set(broken)
    assert contents(out) == contents(undisturbed)
    assert EmbeddingStore.open(str(out)).verify() == []


def test_a_full_disk_stops_the_stage_with_the_path_and_it_goes_on(
    undisturbed: Path, run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # pytest keeps what is logged: an error of Ray Data with the frames of its thread, which on a busy machine has not
    # let the actors go by then.
    caplog.set_level(logging.CRITICAL, logger="ray.data")
    out, calls = tmp_path / "store", Calls(tmp_path / "calls")
    job = job_of(run, out)
    sizes = sorted(p.stat().st_size for p in undisturbed.glob("*.arrow"))
    full = rf"{out}/shard-0000\d\d.arrow: cannot be written: File too large; make room"
    assert free_in_the_end(2.0), "an earlier test holds CPUs"
    with pytest.raises(JobError, match=full) as kept_error:
        # One process for so many shards is an actor, which ends with its limit; a task's process would be used again.
        one = EmbedConfig(actors=1)
        embed_texts([(job, SPANS)], one, make_encoder=make_encoder(calls.path, 0, most_bytes=sizes[6]))
    assert free_in_the_end(2.0), f"who keeps the error keeps the actors: {kept_error.value}"
    assert {p.suffix for p in out.iterdir()} <= {".arrow", ".json"}, "nothing half-written is left"
    kept = identity(out)
    assert len(kept) < 12 and all((out / name).read_bytes() == (undisturbed / name).read_bytes() for name in kept)
    again = Calls(tmp_path / "again")
    embed_texts([(job, SPANS)], EmbedConfig(), make_encoder=make_encoder(again.path, 0))
    assert len(again.started()) == 12 - len(kept)
    assert {name: identity(out)[name] for name in kept} == kept
    assert contents(out) == contents(undisturbed)
