"""How long a command waits for machines, and what a launcher's file declares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ckd_ray.errors import JobError, UserError
from ckd_ray.ray_util import machines
from ckd_ray.ray_util.machines import parse_resources


@pytest.fixture()
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which goes on while somebody sleeps."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(machines, "time", clock)
    return now


def test_what_is_asked_of_a_cluster() -> None:
    assert parse_resources("") == {} and parse_resources("GPU=8, CPU=64") == {"GPU": 8, "CPU": 64}
    for wrong in ("GPU", "GPU=", "GPU=many", "GPU=0", "=3", "GPU:8"):
        with pytest.raises(UserError, match=r"CKD_RAY_WAIT_FOR: not a list of resources"):
            parse_resources(wrong)


def test_waits_for_machines_end_at_their_limits(
    now: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machines, "alive", lambda: [{}] * (2 if now[0] < 40 else 3))
    monkeypatch.setenv("CKD_RAY_WAIT_FOR_NODES", "3")
    machines.wait_for_nodes()
    assert now[0] == 40 and capsys.readouterr().err == "waiting for nodes: 2 of 3\n" * 3  # at once, after 15 s and 30 s
    monkeypatch.setenv("CKD_RAY_WAIT_FOR_NODES", "4")
    machines.wait_for_nodes()
    assert now[0] == 941 and "3 of 4 nodes are there after 15 min 00 s; going on" in capsys.readouterr().err
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 2.0})
    machines._wait_for({"GPU": 8})
    assert now[0] == 2742 and "2 of 8 GPU are there after 30 min 00 s; going on" in capsys.readouterr().err
    with pytest.raises(JobError, match="no machine has come within 30 min 00 s: 0 of 4 TPU"):
        machines._wait_for({"TPU": 4})


def test_gpus_that_have_left_are_waited_for(
    now: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert not machines.wait_for_gpus(expected=False)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    there = {"from": 50.0}
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 4.0} if now[0] >= there["from"] else {})
    monkeypatch.setattr(
        machines, "alive", lambda: [{"Resources": {"CPU": 2.0}}, {"Resources": machines_of(now[0], there["from"])}]
    )
    assert not machines.wait_for_gpus(expected=False) and now[0] == 0  # a cluster of CPUs
    assert machines.wait_for_gpus(expected=True) and now[0] == 50
    assert "all GPUs of the cluster have left\nwaiting for machines: 0 of 1 GPU\n" in capsys.readouterr().err
    assert machines.wait_for_gpus(expected=False) and machines.wait_for_gpus(expected=True) and now[0] == 50
    there["from"] = 1e9
    with pytest.raises(JobError, match="no machine has come within 30 min 00 s: 0 of 1 GPU; give the same command"):
        machines.wait_for_gpus(expected=True)


def machines_of(now: float, first: float) -> dict[str, float]:
    return {"CPU": 8.0, "GPU": 4.0} if now >= first else {}


def kind(gpus: int | None, most: int | None) -> dict[str, Any]:
    return ({} if most is None else {"max_workers": most}) | ({} if gpus is None else {"resources": {"GPU": gpus}})


@pytest.mark.parametrize(
    ("most", "kinds", "gpus"),
    [
        (8, [kind(4, 2), kind(None, 0)], 8),
        (8, [kind(4, 2), kind(1, 3), kind(0, 8)], 11),
        (3, [kind(1, 3), kind(4, 2)], 9),  # the machines with the most come first
        (8, [kind(None, 8), kind(8, None)], 0),
    ],
)
def test_what_a_launcher_s_file_declares(most: int, kinds: list[dict[str, Any]], gpus: int) -> None:
    launcher = {"max_workers": most, "available_node_types": {str(i): value for i, value in enumerate(kinds)}}
    assert machines._gpus_of_workers(launcher) == gpus
