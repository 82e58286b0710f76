"""Check that all nodes of a running cluster see the job's files.

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
from ckd_ray.progress import say
from ckd_ray.ray_util.machines import alive

_ANSWER_WITHIN_S = 120.0
_SEEN_WITHIN_S = 5.0
_SAMPLE = 1 << 16

# What a node sees at a path: None when nothing is there, else {name below it: size and a digest of both ends}.
Seen = dict[str, str] | None


def check_nodes_see(config: Config) -> None:
    """Check that every node sees the same local input files as this one, and `run.storage`.

    Raises:
        UserError: with the nodes that do not.
    """
    nodes = alive()
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
