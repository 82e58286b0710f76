"""The nodes of a running cluster: ask for them, wait until they have started, and check that all see the job's files.

On one node there is nothing to check. On several, a small task on each node looks at the input files and at the storage
of the run before the first stage: a file that only the driver's machine has would fail hours later on another one.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ckd_ray.config import Config
from ckd_ray.errors import JobError, UserError
from ckd_ray.files import filesystem_of, is_local, make_folder
from ckd_ray.jobs.bundle import input_paths
from ckd_ray.jobs.submit import NODES_VARIABLE
from ckd_ray.progress import duration, say

# What a command asks of a cluster that starts its machines when they are needed, such as GPU=8 or GPU=8,CPU=64.
RESOURCES_VARIABLE = "CKD_RAY_WAIT_FOR"
_WAIT_FOR_NODES_S = 900.0
_WAIT_FOR_RESOURCES_S = 1800.0
_ANSWER_WITHIN_S = 120.0
_SEEN_WITHIN_S = 5.0
_SAMPLE = 1 << 16

# What a node sees at a path: None when nothing is there, else {name below it: size and a digest of both ends}.
Seen = dict[str, str] | None


def wait_for_nodes() -> None:
    """Wait for as many nodes as NODES_VARIABLE says, because a stage uses the machines that it finds when it begins.
    After a quarter of an hour go on with those that there are: spot machines may be out of stock."""
    wanted = int(os.environ.get(NODES_VARIABLE) or 1)
    if wanted == 1:
        return
    for tell in _looks(_WAIT_FOR_NODES_S):
        if (have := len(_alive())) >= wanted:
            return
        if tell:
            say(f"waiting for nodes: {have} of {wanted}")
    say(f"{have} of {wanted} nodes are there after {duration(_WAIT_FOR_NODES_S)}; going on with them")


def _looks(within: float) -> Iterator[bool]:
    """Once a second for `within` seconds: whether to tell people, which is in the first second and every 15 seconds."""
    started = told = time.monotonic()
    while True:
        now = time.monotonic()
        if now - started > within:
            return
        yield (tell := now - told >= 15 or now - started < 1)
        told = now if tell else told
        time.sleep(1)


@contextmanager
def asked_resources() -> Iterator[None]:
    """A context in which the cluster has the resources that RESOURCES_VARIABLE names, from an autoscaler that may have
    begun without a worker. It keeps them there between stages, and is free to end them afterwards.

    After half an hour the command goes on with those that have come: spot machines may be out of stock.

    Raises:
        UserError: the variable is no list of resources. JobError: no machine has come.
    """
    wanted = parse_resources(os.environ.get(RESOURCES_VARIABLE, ""))
    if not wanted:
        yield
        return
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{name: 1} for name, count in wanted.items() for _ in range(count)])
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


def _wait_for(wanted: dict[str, int]) -> None:
    import ray

    for tell in _looks(_WAIT_FOR_RESOURCES_S):
        total = ray.cluster_resources()
        have = {name: total.get(name, 0.0) for name in wanted}
        if all(have[name] >= count for name, count in wanted.items()):
            return
        there = ", ".join(f"{have[name]:g} of {count} {name}" for name, count in wanted.items())
        if tell:
            say(f"waiting for machines: {there}")
    waited = duration(_WAIT_FOR_RESOURCES_S)
    if not any(have.values()):
        raise JobError(f"no machine has come within {waited}: {there}")
    say(f"{there} are there after {waited}; going on with them")


def check_nodes_see(config: Config) -> None:
    """Check that every node sees the same local input files as this one, and `run.storage`.

    Raises:
        UserError: with the nodes that do not.
    """
    nodes = _alive()
    if len(nodes) < 2:
        return
    inputs = [(key, filesystem_of(value)[1]) for key, value in input_paths(config) if is_local(value)]
    storage = filesystem_of(config.run.storage)[1] if is_local(config.run.storage) else None
    if not inputs and storage is None:
        return
    with _probe(storage) as probe:
        mine = {key: look_at(path) for key, path in inputs}
        theirs = _ask(nodes, [path for _, path in inputs], probe)
    for position, (key, path) in enumerate(inputs):
        if mine[key] is None:
            raise UserError("this path does not exist", where=key, found=path)
        missing = [name for name, (seen, _) in theirs.items() if seen[position] is None]
        other = [name for name, (seen, _) in theirs.items() if seen[position] not in (None, mine[key])]
        if missing or other:
            _refuse(key, path, missing, other)
    if storage is not None:
        blind = [name for name, (_, sees) in theirs.items() if not sees]
        if blind:
            raise UserError(
                "not every node sees this folder and may write to it",
                where="run.storage",
                expected="a shared file system that all nodes mount at this path, or a URI such as s3://bucket/runs",
                found=f"{storage}, which is not shared with {_list(blind)}",
            )


def look_at(path: str) -> Seen:
    """Names, sizes and a digest of both ends of the file, or of the files in the folder and one folder below it.

    Times of change differ between equal copies, and a digest of whole files would take minutes.
    """
    root = Path(path)
    if root.is_file():
        return {"": _sign(root)}
    if not root.is_dir():
        return None
    files = (file for pattern in ("*", "*/*") for file in root.glob(pattern) if file.is_file())
    return {file.relative_to(root).as_posix(): _sign(file) for file in files if not file.name.startswith(".")}


def _sign(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_SAMPLE))
        stream.seek(max(0, size - _SAMPLE))
        digest.update(stream.read(_SAMPLE))
    return f"{size}:{digest.hexdigest()}"


@contextmanager
def _probe(storage: str | None) -> Iterator[str | None]:
    """A file with a new name in `storage` for the length of the block, which the other nodes have to find."""
    if storage is None:
        yield None
        return
    path = f"{storage}/.probe-{uuid.uuid4().hex[:12]}"
    try:
        make_folder(storage)
        Path(path).write_text("ckd-ray")
    except OSError as error:
        raise UserError("this folder cannot be written to", where="run.storage", found=str(error)) from error
    try:
        yield path
    finally:
        with suppress(OSError):
            os.remove(path)


def _answer(paths: Sequence[str], probe: str | None) -> tuple[list[Seen], bool]:
    """Runs on each node: what it sees at `paths`, and whether it finds the probe and may write to that folder."""
    seen = [look_at(path) for path in paths]
    if probe is None:
        return seen, True
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not os.path.exists(probe):  # NFS shows a new file within seconds
        if time.monotonic() > deadline:
            return seen, False
        time.sleep(0.2)
    mine = f"{probe}-{uuid.uuid4().hex[:8]}"
    try:
        Path(mine).write_text("ckd-ray")
        os.remove(mine)
    except OSError:
        return seen, False
    return seen, True


def _ask(nodes: list[dict[str, Any]], paths: list[str], probe: str | None) -> dict[str, tuple[list[Seen], bool]]:
    """The answers by the name of the node. A node that dies meanwhile gives none, and takes no part in the job."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_answer)
    asked = {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(paths, probe)
        for node in nodes
    }
    answers: dict[str, tuple[list[Seen], bool]] = {}
    deadline = time.monotonic() + _ANSWER_WITHIN_S
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=max(1.0, deadline - time.monotonic()))
        except (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as error:
            raise JobError(f"node {name} cannot run ckd-ray: {str(error).strip().splitlines()[-1]}") from error
        except ray.exceptions.RayError as error:
            say(f"node {name} does not answer, and is left out of the check ({type(error).__name__})")
    return answers


def _refuse(key: str, path: str, missing: list[str], other: list[str]) -> None:
    found = [f"it is missing on {_list(missing)}"] if missing else []
    found += [f"it has other contents on {_list(other)}"] if other else []
    raise UserError(
        "not every node sees this path",
        where=f"{key} {path}",
        expected="the same files on all nodes: a shared file system, or a URI such as s3://bucket/folder",
        found="; ".join(found),
    )


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]
