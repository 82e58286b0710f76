"""The private and undocumented parts of Ray, PyTorch and transformers that the code uses: each is there, and is named.

A new version of a library may drop any of them without a word. Then a test here fails and says which part is gone and
who uses it; a mere import error, or wrong numbers, would come later and say less.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ckd_ray.ray_util import watch
from ckd_ray.ray_util.sockets import knock
from tests.support import told_by

PACKAGE = Path(__file__).parents[2] / "ckd_ray"
LIBRARIES = ("ray", "torch", "transformers")

# What the code imports or reads by a private name. `PRIVATE` is complete: a test compares it with the source.
PRIVATE: dict[str, str] = {
    "ray._private.accelerators.NvidiaGPUAcceleratorManager": "doctor counts GPUs as Ray does",
    "ray._private.grpc_utils.init_grpc_channel": "a head that refuses the token is found out in seconds",
    "ray._private.state": "a server that finds no machine is found out",
    "ray._private.state.available_resources_per_node": "pools of actors are placed by what is free on each node",
    "ray._raylet.Config": "a token counts in a program that imported Ray before",
    "ray._private.utils.get_ray_address_file": "a Ray that a command starts for itself is not found by other commands",
    "ray._private.utils.write_ray_address": "the Ray that was there before stays the one that commands find",
    "ray._private.utils.read_ray_address": "a Ray of this machine is found without starting one",
    "ray._private.worker._global_node": "the end of a daemon that this process started is noticed",
    "ray.autoscaler._private.command_runner.SSHOptions": "the tunnel has the launcher's own options of ssh",
    "ray.autoscaler._private.commands._bootstrap_config": "the tunnel has the key that the launcher made",
    "ray.autoscaler._private.util.prepare_config": "a launcher's file is completed",
    "ray.autoscaler._private.util.validate_config": "a launcher's file is checked before anything starts",
    "ray.data._internal.execution.execution_callback.ExecutionCallback": "a pool that does not start is given up",
    "ray.data._internal.execution.streaming_executor_state.Topology": "its actors that have started are counted",
    "ray.job_submission.JobSubmissionClient._do_request": "answers of a dashboard have a limit of time",
    "ray.actor.ActorHandle._actor_id": "the state of an actor is asked for by its id",
    "ray.data.DataContext._set_current": "Ray Data's settings of a caller's program are given back",
    "torch._foreach_lerp_": "the moving average of the weights",
    "torch._int_mm": "products of 8 bits",
    "torch.ops.mkldnn._linear_pointwise": "linear layers with their activation on CPUs",
    "torch.ops.mkldnn._reorder_linear_weight": "weights in oneDNN's own order",
    "transformers.PretrainedConfig._attn_implementation": "texts are packed without padding",
}
# Public names of modules that the libraries' own documentation does not list.
UNDOCUMENTED: dict[str, str] = {
    "ray.autoscaler.sdk.bootstrap_config": "the security group and the role are made before the machines",
    "ray.autoscaler.sdk.create_or_update_cluster": "clusters are started",
    "ray.autoscaler.sdk.get_head_node_ip": "the head is found",
    "ray.autoscaler.sdk.rsync": "results come home",
    "ray.autoscaler.sdk.teardown_cluster": "clusters are ended",
    "ray.data.DataContext.get_current": "Ray Data prints no progress of its own",
    "ray.train.v2.api.exceptions.TrainingFailedError": "a failed training is told with its cause",
    "ray.tune.progress_reporter.TrialProgressCallback._print": "Ray Tune prints no tables of its own",
    "transformers.AttentionInterface.register": "texts are packed without padding",
    "transformers.AttentionMaskInterface.register": "texts are packed without padding",
}
# Names that the source reads of objects, whose class the text alone does not tell.
_READ = {
    "_actor_id": "ray.actor.ActorHandle._actor_id",
    "_set_current": "ray.data.DataContext._set_current",
    "_attn_implementation": "transformers.PretrainedConfig._attn_implementation",
    "_do_request": "ray.job_submission.JobSubmissionClient._do_request",
    "_global_node": "ray._private.worker._global_node",
    "_topology": "ray.data._internal.execution.streaming_executor_state.Topology",
}
_OF_OTHERS = {"os._exit"}  # documented
# Environment variables of Ray that no page of its documentation describes, by the module or program that reads them.
VARIABLES: dict[str, str] = {
    "RAY_AIR_NEW_OUTPUT": "ray.tune.experimental.output",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "ray.train.v2._internal.constants",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "ray.train.v2._internal.constants",
    "RAY_UP_enable_autoscaler_v2": "ray.autoscaler._private.commands",
    "RAY_idle_worker_killing_time_threshold_ms": "the raylet",
}


def found(path: str) -> Any:
    """The object of a dotted path; AttributeError or ImportError where a part is gone."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not ".".join(parts).startswith(error.name or "?"):
                raise
            continue
        for name in parts[count:]:
            value = getattr(value, name)
        return value
    raise ImportError(path)


@pytest.mark.parametrize("path", [*PRIVATE, *UNDOCUMENTED])
def test_a_part_that_the_code_uses_is_there(path: str) -> None:
    library, use = path.partition(".")[0], {**PRIVATE, **UNDOCUMENTED}[path]
    version = importlib.import_module(library).__version__
    try:
        found(path)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{library} {version} has no {path} ({error}), by which {use}; cap {library} in pyproject.toml")


def private_uses(source: str) -> Iterator[str]:
    """Dotted paths of private names of the libraries in a module's text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                if re.search(r"\._", path) and path != "ray._private.worker":  # the name that is read of it follows
                    yield path
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            text = ast.unparse(node)
            if text.split(".")[0] in LIBRARIES:
                yield text
            elif node.attr in _READ:
                yield _READ[node.attr]
            elif not re.match(r"(self|cls|model|other|super\(\))\.", text) and text not in _OF_OTHERS:
                yield text


def test_the_list_of_private_parts_is_complete() -> None:
    used: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in private_uses(path.read_text(encoding="utf-8")):
            used.setdefault(name, []).append(path.relative_to(PACKAGE).as_posix())
    unnamed = {name: places for name, places in used.items() if name not in PRIVATE}
    assert not unnamed, f"name these in PRIVATE, with what depends on them: {unnamed}"
    assert not PRIVATE.keys() - used.keys(), "the code does not use these any more: take them out of PRIVATE"


def test_ray_s_daemons_are_listed_by_their_names(ray_session: None) -> None:
    """`ray_util/watch.py` asks them whether they live."""
    from ray._private import worker

    processes = worker._global_node.all_processes
    assert {"raylet", "gcs_server"} <= processes.keys()
    assert all(info.process.poll() is None for kind in ("raylet", "gcs_server") for info in processes[kind])
    (raylet,) = processes["raylet"]  # of a Ray that was joined, it is found by its socket
    assert watch._is_raylet(raylet.process.pid, worker._global_node.raylet_socket_name)
    assert not watch._is_raylet(os.getpid(), worker._global_node.raylet_socket_name)
    assert knock(worker._global_node.gcs_address)


def test_a_thread_tells_by_an_event_that_it_has_begun() -> None:
    """`ray_util/processes.py` puts a limit on the wait for it."""
    from ckd_ray.ray_util.processes import _python_s_start  # a test of the command may have put ours in its place

    thread = threading.Thread(target=int)
    assert type(thread._started) is threading.Event  # type: ignore[attr-defined]
    assert "self._started.wait()" in inspect.getsource(_python_s_start)


def test_ray_s_workers_write_logs_that_begin_with_their_job(ray_session: None) -> None:
    """`ray_util/stuck.py` knows the processes of its own job by them, and what they do by their titles."""
    import ray

    from ckd_ray.ray_util.stuck import _at_work

    def sleeping() -> None:
        time.sleep(600)

    work = ray.remote(num_cpus=0, max_retries=0)(sleeping).remote()
    deadline = time.monotonic() + 120
    while not (found := [worker for worker in _at_work() if "sleeping" in worker.title]):
        assert time.monotonic() < deadline, "no process of this job is found"
    _at_work(found)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(work, timeout=120)


@pytest.mark.slow
def test_when_ray_is_at_rest() -> None:
    """`ray_util/stuck.py` takes that for a task which Ray has lost."""
    found = told_by("tests.fault.at_rest")
    assert not found.pop("before a node has left")
    assert len(found) == 9 and all(found.values()), found


def test_what_ray_tells_of_nodes(ray_session: None) -> None:
    import ray

    from ckd_ray.ray_util.actor_pool import Node, cluster_nodes

    total, _ = cluster_nodes()
    assert total == [Node(2.0, 0.0)]
    assert any("node:__internal_head__" in node["Resources"] for node in ray.nodes())


def test_ray_data_has_the_switches_that_are_set(ray_session: None) -> None:
    import ray

    context = ray.data.DataContext.get_current()
    for name in ("enable_progress_bars", "print_on_execution_start", "raise_original_map_exception"):
        assert isinstance(getattr(context, name), bool), name
    assert isinstance(context.issue_detectors_config.detectors, list)


def test_the_signatures_of_the_launcher_are_those_that_are_called() -> None:
    from ray.autoscaler import sdk
    from ray.autoscaler._private.command_runner import SSHOptions

    for call, names in {
        sdk.create_or_update_cluster: {"no_restart"},
        sdk.bootstrap_config: {"no_config_cache"},
        sdk.rsync: {"source", "target", "down"},
        SSHOptions("key", None, ProxyCommand=None).to_ssh_options_list: {"timeout"},
    }.items():
        missing = names - inspect.signature(call).parameters.keys()
        assert not missing, f"{call.__qualname__} takes no {missing}"


def test_a_failed_training_names_its_workers() -> None:
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    assert issubclass(WorkerGroupError, TrainingFailedError)
    assert WorkerGroupError("two failed", {1: ValueError("why")}).worker_failures.keys() == {1}


@pytest.mark.parametrize("name", VARIABLES)
def test_ray_still_reads_the_variable(name: str) -> None:
    """By its name in the modules, or in the program, that read it."""
    import ray

    root = Path(ray.__file__).parent
    reader = VARIABLES[name]
    if reader == "the raylet":
        key = name.removeprefix("RAY_").encode()
        there = key in (root / "core/src/ray/raylet/raylet").read_bytes()
    else:
        module = root.parent / f"{reader.replace('.', '/')}.py"
        there = module.exists() and name.removeprefix("RAY_UP_") in module.read_text()
    assert there, f"ray {ray.__version__}: {reader} does not read {name} any more"


def test_an_encoder_s_attention_is_given_what_only_ours_knows(tiny_backbone: str) -> None:
    """transformers hands unknown arguments of a model on to the attention function, and asks for its name each time."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModel

    seen: list[Any] = []

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> tuple[Any, None]:
        seen.append((mask, given["ours"], given.get("dropout"), given.get("scaling")))
        return value.transpose(1, 2), None

    AttentionInterface.register("ckd_ray_test", attention)
    AttentionMaskInterface.register("ckd_ray_test", lambda **_: None)
    model = AutoModel.from_pretrained(tiny_backbone)
    ids = torch.ones(1, 3, dtype=torch.int64)
    before = model(input_ids=ids).last_hidden_state
    model.config._attn_implementation = "ckd_ray_test"
    after = model(input_ids=ids, ours="runs").last_hidden_state
    assert [given[:2] for given in seen] == [(None, "runs")] * 2 and not torch.equal(before, after)


def test_the_layers_that_are_made_faster_have_their_names(tiny_backbone: str) -> None:
    """`fuse_linears` finds an activation behind a layer by both names, and takes GELU for what it is."""
    from transformers import AutoModel

    from ckd_ray.model.linears import FusedLinear, fuse_linears

    model = AutoModel.from_pretrained(tiny_backbone)
    if not fuse_linears(model):
        pytest.skip("no oneDNN")
    fused = [m for m in model.modules() if isinstance(m, FusedLinear) and m.activation == "gelu"]
    assert len(fused) == model.config.num_hidden_layers, "layers are computed without their activation fused: slower"


def test_a_missing_part_is_told_clearly() -> None:
    """The test of a part fails with its name, the version, and what depends on it."""
    code = (
        "import sys, tests.unit.test_private_parts as t\n"
        "import ray._private.utils as utils\n"
        "del utils.read_ray_address\n"
        "try:\n"
        "    t.test_a_part_that_the_code_uses_is_there('ray._private.utils.read_ray_address')\n"
        "except BaseException as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert re.search(r"ray [\d.]+ has no ray\._private\.utils\.read_ray_address .*is found without", done.stdout), done
