"""What the tests share: one Ray session, a tiny random BERT with its tokenizer, and a tiny collection."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 starves the workers where anything else runs
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")  # as ray_util/session.py starts Ray
# Threads that wait for each other in a loop take the cores from other processes: on two busy cores a small product of
# two matrices takes 7 times the processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # on a busy machine
# An actor of each training, which looks for machines that a cloud takes back.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))

import pytest

from tests.fast_start.starter import VARIABLE, running
from tests.finished import Finished, finished_once
from tests.support import tiny_bert, write_collection

# The files that take longest, in the order in which the test processes begin them (`--dist loadfile`): a long file that
# is begun late keeps one process at work while the others have none left.
LONGEST = (
    "cli/test_examples.py", "distributed/test_pipeline.py", "distributed/test_training.py", "cli/test_cli.py",
    "fault/test_embed_faults.py", "distributed/test_retrieve.py", "distributed/test_cross_encoder.py",
    "distributed/test_upgrade.py", "distributed/test_tune.py", "distributed/test_api.py", "cli/test_mistakes.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if (
        sys.platform == "linux" and VARIABLE not in os.environ
    ):  # pytest-xdist's processes find the one of the process that has started them
        starter = running()
        os.environ.update(starter.__enter__())
        config.add_cleanup(lambda: starter.__exit__(None, None, None))
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist would begin with the files of most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    order = {here / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(params=["512", "256", "128", "torch"])
def clustering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every way to cluster on a CPU: in C with vectors of so many bits, and in torch."""
    from ckd_ray.collective import native

    if request.param == "torch":
        monkeypatch.setattr(native, "_library", lambda: None)
        yield "torch"
    elif native._library() is None:
        pytest.skip("the package was installed without a compiler")
    else:
        if native.vector_bits(int(request.param)) != int(request.param):
            native.vector_bits()
            pytest.skip("this processor has no such vectors")
        yield request.param
        native.vector_bits()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray with two CPUs for all tests of this process."""
    import ray

    from ckd_ray.ray_util.session import _quiet_data
    from tests.ray_head import small_ray

    with small_ray():
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=150 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    _quiet_data()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random two-layer BERT of 32 dimensions and a word-level vocabulary."""
    return tiny_bert(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def tiny_collection(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`write_collection` once for all."""
    return str(write_collection(tmp_path_factory.mktemp("collection")))


@pytest.fixture(scope="session")
def finished_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A run with every stage done, made once for all test processes. Nobody may change it: see `Finished.copy`."""

    def run(values: list[str]) -> None:
        from ckd_ray.checks import load_config
        from ckd_ray.pipeline import graph
        from ckd_ray.pipeline.runner import run_stages

        request.getfixturevalue("ray_session")
        reports = run_stages(load_config(None, values))
        assert [r.name for r in reports] == [name for name in graph.STAGE_NAMES if name != "cross_encoder"]
        assert not any(r.skipped for r in reports)

    own = tmp_path_factory.getbasetemp()
    found = finished_once((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "finished", run)
    yield found
    assert found.changed() == [], "a test has changed the run that all share"
