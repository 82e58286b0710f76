"""The machines of a cluster: ask its autoscaler for them, and wait until they have come, before and between stages.

A stage uses the machines that it finds when it begins. Where GPUs are declared and none has come yet, or all have left,
it would compute on CPUs, for days.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from ckd_ray.errors import JobError, UserError
from ckd_ray.progress import duration, say
from ckd_ray.ray_util.watch import head_address

# How many nodes a job waits for; ckd-ray sets it from the launcher's file.
NODES_VARIABLE = "CKD_RAY_WAIT_FOR_NODES"
# What a command asks of a cluster that starts its machines when they are needed, such as GPU=8 or GPU=8,CPU=64.
RESOURCES_VARIABLE = "CKD_RAY_WAIT_FOR"
_NODES_WITHIN_S = 900.0
_RESOURCES_WITHIN_S = 1800.0


def wait_for_nodes() -> None:
    """Wait for as many nodes as NODES_VARIABLE says. After a quarter of an hour go on with those that there are: spot
    machines may be out of stock."""
    wanted = int(os.environ.get(NODES_VARIABLE) or 1)
    if wanted == 1:
        return
    for tell in _looks(_NODES_WITHIN_S):
        if (have := len(alive())) >= wanted:
            return
        if tell:
            say(f"waiting for nodes: {have} of {wanted}")
    say(f"{have} of {wanted} nodes are there after {duration(_NODES_WITHIN_S)}; going on with them")


@contextmanager
def asked_resources() -> Iterator[None]:
    """Ask the autoscaler for the resources that RESOURCES_VARIABLE names, and wait for them. The autoscaler, which may
    have started without a worker, keeps them for the length of the block, and may end them after it.

    Without the variable, a cluster that has no GPU yet is asked for all that its autoscaler's file declares, and the
    command waits for the first: stages use those that come later.

    After half an hour the command goes on with those that have come: spot machines may be out of stock.

    Raises:
        UserError: the variable is no list of resources. JobError: no machine has come.
    """
    asked = wanted = parse_resources(os.environ.get(RESOURCES_VARIABLE, ""))
    if not asked and not _gpus() and (declared := declared_gpus()):
        asked, wanted = {"GPU": declared}, {"GPU": 1}
        say(f"the cluster has no GPU yet; its autoscaler is asked for the {declared} that it may start")
    if not asked:
        yield
        return
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{name: 1} for name, count in asked.items() for _ in range(count)])
    try:
        _wait_for(wanted)
        yield
    finally:
        with suppress(Exception):  # a lost Ray has nobody left to tell
            request_resources(bundles=[])


def parse_resources(text: str) -> dict[str, int]:
    """{"GPU": 8, "CPU": 64} of `GPU=8,CPU=64`.

    Raises:
        UserError: it is no such list.
    """
    found: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, count = part.partition("=")
        if not name or not count.isdecimal() or int(count) < 1:
            raise UserError("not a list of resources", where=RESOURCES_VARIABLE, expected="GPU=8,CPU=64", found=text)
        found[name] = int(count)
    return found


def declared_gpus() -> int:
    """The GPUs of all workers that the autoscaler of this Ray may start. 0 where no autoscaler runs on this machine,
    as on Kubernetes, or its file does not tell."""
    address = f"--gcs-address={head_address()}".encode()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
            words = entry.read_bytes().split(b"\0")
            files = [word.partition(b"=")[2] for word in words if word.startswith(b"--autoscaling-config=")]
            if files and address in words:
                return _gpus_of_workers(yaml.safe_load(Path(os.fsdecode(files[0])).expanduser().read_text("utf-8")))
    return 0


def _gpus_of_workers(launcher: dict[str, Any]) -> int:
    """The most GPUs that the workers of a launcher's file have together."""
    kinds = launcher["available_node_types"].values()
    workers = [((kind.get("resources") or {}).get("GPU", 0), kind.get("max_workers", 0)) for kind in kinds]
    left, gpus = int(launcher["max_workers"]), 0
    for each, most in sorted(workers, reverse=True):
        gpus += int(each) * min(int(most), left)
        left -= min(int(most), left)
    return gpus


def wait_for_gpus(expected: bool) -> bool:
    """Whether the cluster has GPUs. Where they are `expected` and all have left, wait for others for half an hour.

    Raises:
        JobError: none has come.
    """
    if expected and not _gpus():
        say("all GPUs of the cluster have left")
        _wait_for({"GPU": 1})
    return _gpus() > 0


def alive() -> list[dict[str, Any]]:
    """The nodes that Ray knows to be alive, as `ray.nodes` describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _gpus() -> float:
    import ray

    if not ray.is_initialized():  # the first stages need none
        return 0.0
    return sum(node["Resources"].get("GPU", 0.0) for node in alive())


def _wait_for(wanted: dict[str, int]) -> None:
    import ray

    for tell in _looks(_RESOURCES_WITHIN_S):
        total = ray.cluster_resources()
        have = {name: total.get(name, 0.0) for name in wanted}
        if all(have[name] >= count for name, count in wanted.items()):
            return
        there = ", ".join(f"{have[name]:g} of {count} {name}" for name, count in wanted.items())
        if tell:
            say(f"waiting for machines: {there}")
    waited = duration(_RESOURCES_WITHIN_S)
    if not any(have.values()):
        raise JobError(f"no machine has come within {waited}: {there}; give the same command again later")
    say(f"{there} are there after {waited}; going on with them")


def _looks(within: float) -> Iterator[bool]:
    """Yields once a second for `within` seconds: whether to print progress (in the first second, then every 15)."""
    started = told = time.monotonic()
    while True:
        now = time.monotonic()
        if now - started > within:
            return
        yield (tell := now - told >= 15 or now - started < 1)
        told = now if tell else told
        time.sleep(1)
