"""What the tests share: one Ray session, a tiny random BERT with its tokenizer, and a tiny collection."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 starves the workers where anything else runs
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")  # as ray_util/session.py starts Ray
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))

import pytest

from tests.support import tiny_bert, write_collection


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
