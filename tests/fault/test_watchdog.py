"""Every stage, with a process of it that is stopped for ever or waits for ever: it goes on with another process, or the
command ends with a message. All of it is real: Ray, the stage, and a process that is not continued.

The default suite has a task that is stopped and a command that waits; `-m soak` has every stage.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckd_ray.checks import load_config
from ckd_ray.errors import LostRayError
from ckd_ray.files import delete
from ckd_ray.pipeline import graph
from ckd_ray.pipeline.runner import run_stages
from ckd_ray.ray_util import stuck, watch
from ckd_ray.ray_util.watch import terminate
from ckd_ray.retrieve.servers import ShardServer
from ckd_ray.runs.directory import RunContext
from ckd_ray.tune.job import run_tune
from tests.fault.processes import below
from tests.finished import Finished
from tests.support import classifier, overrides

# Seconds without work after which this test's stages are judged, and by which everything has to be over: starts of
# processes take most of it on a busy machine.
LIMIT, OVER = 16.0, 600.0
WEIGHTS = (".arrow", ".npy", ".parquet", ".safetensors", ".run", ".json")
TIMES = ("_manifest.json", "training.json", "_making.json", "card.json")


def hang(marker: str, how: str, times: int) -> None:
    """In a process at work: it stops, or waits for ever, unless `times` processes have done so before."""
    for number in range(times):
        try:
            with open(f"{marker}-{number}", "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            continue
        if how == "is stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        threading.Event().wait()


def hanging(work: Callable[..., Any], marker: str, how: str, times: int) -> Callable[..., Any]:
    """`work` that hangs first. Pickled by value, and the functions that it calls by name."""

    def hangs(*args: Any, **kwargs: Any) -> Any:
        hang(marker, how, times)
        return work(*args, **kwargs)

    return hangs


def hanging_class(kind: type, method: str, marker: str, how: str, times: int) -> type:
    return type(kind.__name__, (kind,), {method: hanging(getattr(kind, method), marker, how, times)})


class ShardServerThatHangs(ShardServer):
    """Imported by the worker, unlike the others: a cached property is not pickled. `hang.json` beside the run says how
    it hangs."""

    def _hang_in(self, method: str) -> None:
        told = json.loads((Path(self._store).parents[2] / "hang.json").read_text())
        if told["method"] == method:
            hang(told["marker"], told["how"], told["times"])

    def ready(self) -> int:
        self._hang_in("ready")
        return super().ready()

    def search(self, *arguments: Any) -> Any:
        self._hang_in("search")
        return super().search(*arguments)


def hanging_training(marker: str, how: str, times: int) -> Callable[[dict[str, Any]], None]:
    """`train_worker` whose first worker hangs at its third step."""

    def train(config: dict[str, Any]) -> None:
        from ckd_ray.distill import worker

        update = worker._Loop._update

        def hangs(self: Any, inputs: Any) -> Any:
            if inputs.step == 2 and self.rank == 0:
                hang(marker, how, times)
            return update(self, inputs)

        worker._Loop._update = hangs  # type: ignore[method-assign]
        try:
            worker.train_worker(config)
        finally:
            worker._Loop._update = update  # type: ignore[method-assign]

    return train


# What is at work in a stage, where the driver finds it, and the method of an actor; and settings that bring it to work.
WORK: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "teacher": ("teacher", "ckd_ray.distill.worker.train_worker", "", ()),
    "teacher, two workers": ("teacher", "ckd_ray.distill.worker.train_worker", "", ("teacher.workers=2",)),
    "embed: actor": ("embed", "ckd_ray.embed.stream.ShardEncoder", "__call__", ()),
    "embed: tokeniser": ("embed", "ckd_ray.embed.stream._tokenise", "", ()),
    "retrieve: server": ("retrieve", "ckd_ray.retrieve.servers.ShardServer", "search", ()),
    "retrieve: server, loading": ("retrieve", "ckd_ray.retrieve.servers.ShardServer", "ready", ()),
    "retrieve: part": ("retrieve", "ckd_ray.retrieve.stream._retrieve_part", "", ("retrieve.actors=auto",)),
    "label": ("label", "ckd_ray.labels.stage._label_part", "", ()),
    "ensemble": ("ensemble", "ckd_ray.ensemble.stage._score_part", "", ()),
    "cross_encoder": ("cross_encoder", "ckd_ray.cross_encoder.stream.PartScorer", "__call__", ()),
    "distill": ("distill", "ckd_ray.distill.worker.train_worker", "", ()),
    "evaluate": ("evaluate", "ckd_ray.retrieve.stream._retrieve_part", "", ("retrieve.actors=auto",)),
    "baselines": ("evaluate", "ckd_ray.pipeline.baselines.rank_bm25", "", ()),
}
DEFAULT = {("retrieve: part", "is stopped")}


def cases() -> Iterator[Any]:
    for name in WORK:
        for how in ("is stopped", "waits"):
            yield pytest.param(name, how, id=f"{name}, {how}", marks=() if (name, how) in DEFAULT else pytest.mark.soak)


@pytest.fixture()
def interrupts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGTERM as a command has it. On a busy machine a stage is without processes for a while."""
    monkeypatch.setattr(stuck, "_ALONE", 100)
    monkeypatch.setattr(watch, "_why", None)
    before = signal.signal(signal.SIGTERM, terminate)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture()
def marker(tmp_path: Path) -> Iterator[str]:
    """Where processes that hang leave their numbers; none of them is left over."""
    yield str(tmp_path / "hung")
    for path in tmp_path.glob("hung-*"):
        if is_there(int(path.read_text())):
            os.kill(int(path.read_text()), signal.SIGKILL)


def is_there(pid: int) -> bool:
    return any(process.pid == pid for process in below(os.getpid()))


def digests(folder: str) -> dict[str, str]:
    files = [p for p in sorted(Path(folder).rglob("*")) if p.suffix in WEIGHTS and p.name not in TIMES]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def break_at(patch: pytest.MonkeyPatch, name: str, marker: str, how: str, times: int) -> None:
    _, target, method, _ = WORK[name]
    module, _, attribute = target.rpartition(".")
    work = getattr(__import__(module, fromlist=[attribute]), attribute)
    if attribute == "train_worker":
        broken: Any = hanging_training(marker, how, times)
    elif attribute == "ShardServer":
        broken, told = ShardServerThatHangs, {"method": method, "marker": marker, "how": how, "times": times}
        Path(marker).with_name("hang.json").write_text(json.dumps(told))
    elif method:
        broken = hanging_class(work, method, marker, how, times)
    else:
        broken = hanging(work, marker, how, times)
    patch.setattr(target, broken)


def config_of(finished: Finished, storage: Path, name: str) -> Any:
    more = WORK[name][3]
    if name == "cross_encoder":
        more += ("cross_encoder.maxlen=48", f"cross_encoder.model={classifier(storage / 'c', finished.backbone, 1)}")
    return load_config(None, finished.values(storage, *more))


@pytest.mark.parametrize(("name", "how"), cases())
def test_a_stage_goes_on_without_a_process_that_hangs(
    ray_session: None, finished_run: Finished, interrupts: None, marker: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, how: str,
) -> None:  # fmt: skip
    finished_run.copy(tmp_path)
    config, stage = config_of(finished_run, tmp_path, name), WORK[name][0]
    output = {s.name: s for s in graph.STAGES}[stage].output(RunContext.of(config).paths)
    expected = digests(output)
    delete(output)
    if name == "baselines":
        delete(RunContext.of(config).paths.baseline("bm25"))
    break_at(monkeypatch, name, marker, how, 1)
    started = time.monotonic()
    with stuck.moving(LIMIT):
        run_stages(config, until=stage)
    took = time.monotonic() - started
    pid, said = int(Path(f"{marker}-0").read_text()), capsys.readouterr().err
    assert LIMIT < took < OVER, f"{took:.0f} s"
    assert not is_there(pid)
    told = [line for line in said.splitlines() if "no process computes" in line]
    assert len(told) == 1 and f"(process {pid} on " in told[0] and "their work is done again" in told[0], said
    if "teacher.workers=2" not in WORK[name][3]:  # which sum in another order
        assert digests(output) == expected or stage == "cross_encoder"  # which the finished run lacks


@pytest.mark.soak
def test_a_stage_that_hangs_again_ends_the_command(
    ray_session: None, finished_run: Finished, interrupts: None, marker: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    finished_run.copy(tmp_path)
    config = config_of(finished_run, tmp_path, "label")
    delete(RunContext.of(config).paths.labels)
    break_at(monkeypatch, "label", marker, "is stopped", 2)
    with pytest.raises(LostRayError, match="after processes were ended once") as raised, stuck.moving(LIMIT):
        run_stages(config, until="label")
    second = Path(f"{marker}-1").read_text()
    assert f"(process {second} on " in str(raised.value) and str(raised.value).startswith("label: ")
    assert f"ckd-ray: {raised.value}\n" in capsys.readouterr().err


def test_a_command_that_waits_for_its_input_ends(
    ray_session: None, interrupts: None, tmp_path: Path, tiny_backbone: str, tiny_collection: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stage collection, which has no processes but the command itself."""
    monkeypatch.setattr("ckd_ray.data.build_collection", lambda *_, **__: threading.Event().wait())
    monkeypatch.setattr(stuck, "_ALONE", 4)
    config = load_config(None, overrides(tmp_path, tiny_backbone, tiny_collection))
    with pytest.raises(LostRayError, match=r"^collection: nothing has been finished for .* the storage of the run"):
        with stuck.moving(1.0):
            run_stages(config, until="collection")
    assert not Path(tmp_path, "tiny", "corpus").exists()


@pytest.mark.soak
def test_a_search_goes_on_without_a_worker_that_is_stopped(
    ray_session: None, finished_run: Finished, interrupts: None, marker: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The trainings of a search run in processes of Ray Tune, so the first that is at work is stopped from outside; a
    while after its start, as Ray Train tries no start of its workers again."""
    finished_run.copy(tmp_path)
    space = "tune.space={distill.temperature: {loguniform: [0.2, 5.0]}}"
    changes = ("tune.search=random", "tune.trials=1", "tune.measurements=2", "distill.steps=300", space)
    config = load_config(None, finished_run.values(tmp_path, *changes, "tune.retrain=false"))
    over = threading.Event()

    def stop_one() -> None:
        while not over.wait(0.01):
            for process in below(os.getpid()):
                if "RayTrainWorker.run_train_fn" in process.title and not over.wait(3.0):
                    os.kill(process.pid, signal.SIGSTOP)
                    Path(f"{marker}-0").write_text(str(process.pid))
                    return

    thread = threading.Thread(target=stop_one, daemon=True)
    thread.start()
    try:
        with stuck.moving(3 * LIMIT):  # the start of a training is no progress of a search
            summary = run_tune(config)
    finally:
        over.set()
    assert f"(process {Path(f'{marker}-0').read_text()} on " in capsys.readouterr().err
    assert summary["best"]["trial"] == 0
