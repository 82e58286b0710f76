"""Checks of the machine: versions, extras, processor, memory, accelerators, its host name."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ckd_ray.config import Config
from ckd_ray.doctor.check import GIB, Check, State

_OLDEST_PYTHON = (3, 10)
_LIBRARIES = ("ray", "torch", "transformers", "faiss-cpu", "pyarrow")
# The share of the available memory that Ray takes for its object store by default.
_STORE_SHARE = 0.3
_LEAST_MEMORY = 6 * GIB
_SHM = "/dev/shm"  # noqa: S108  (not a file that we make)
_EXTRAS = {"optuna": "tune", "ir_datasets": "ir", "boto3": "aws"}


def versions() -> Iterator[Check]:
    """Python and the libraries, against the ranges that the package declares."""
    state: State = "ok" if sys.version_info >= _OLDEST_PYTHON else "fail"
    yield Check("python", state, platform.python_version(), "use Python 3.10 or newer")
    ranges = declared()
    for name in _LIBRARIES:
        yield library(name, ranges.get(name))


def declared() -> dict[str, str]:
    """The version range of each dependency by the metadata of the package; empty where it is not installed."""
    try:
        lines = requires("ckd-ray") or []
    except PackageNotFoundError:
        return {}
    found = [Requirement(line) for line in lines]
    return {r.name.lower(): str(r.specifier) for r in found if r.marker is None}


def library(name: str, accepted: str | None) -> Check:
    """One library against the accepted versions, such as `>=2.50`; None accepts every version."""
    try:
        have = version(name)
    except PackageNotFoundError:
        if name == "faiss-cpu" and importlib.util.find_spec("faiss") is not None:
            return Check(name, "ok", "another build of faiss is installed")
        return Check(name, "fail", "not installed", f"pip install '{name}{accepted or ''}'")
    if accepted and not SpecifierSet(accepted).contains(have, prereleases=True):
        return Check(name, "fail", f"{have}, supported is {accepted}", f"pip install '{name}{accepted}'")
    return Check(name, "ok", have)


def extras(config: Config) -> Iterator[Check]:
    """Optional packages: those that the configuration needs must be there, the others are listed."""
    have = {name: importlib.util.find_spec(name) is not None for name in _EXTRAS}
    if config.collection.format == "ir_datasets" and not have["ir_datasets"]:
        found = "collection.format is ir_datasets, which is not installed"
        yield Check("datasets", "fail", found, "pip install 'ckd-ray[ir]'")
    missing = [f"{name} (ckd-ray[{extra}])" for name, extra in _EXTRAS.items() if not have[name]]
    present = [name for name in _EXTRAS if have[name]]
    found = ", ".join(present) or "none"
    yield Check("extras", "ok", f"{found}; not installed: {', '.join(missing)}" if missing else found)


def processor() -> Iterator[Check]:
    """The cores, and the vector instructions that make the encoders and faiss fast."""
    flags = cpu_flags()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {"avx2": "", "avx512f": "", "avx512_vnni": "int8", "avx512_bf16": "bf16", "amx_bf16": "bf16"}
    has = [f"{flag} ({use})" if use else flag for flag, use in wanted.items() if flag in flags]
    found = f"{cores} cores; {', '.join(has) or 'no known vector instructions'}"
    slow = flags and "avx2" not in flags and platform.machine() in ("x86_64", "AMD64")
    fix = "encoding on this CPU is slow: use a machine with AVX2, or a GPU"
    yield Check("processor", "warn" if slow else "ok", found, fix)


def cpu_flags(path: str = "/proc/cpuinfo") -> set[str]:
    """The flags of the first core; empty where the system does not list them."""
    try:
        match = re.search(r"^(?:flags|Features)\s*:(.*)$", Path(path).read_text(), re.M)
    except OSError:
        return set()
    return set(match[1].split()) if match else set()


def memory(path: str = "/proc/meminfo") -> Iterator[Check]:
    """The memory of the machine, or the share of it that the container may use."""
    total, available = memory_bytes(path)
    if total is None or available is None:
        return
    limit = _container_limit()
    most = min(total, limit) if limit else total
    found = f"{most / GIB:.1f} GiB, {min(available, most) / GIB:.1f} available"
    fix = "the quick start takes about 3 GiB; close other programs, or use a larger machine"
    yield Check("memory", "warn" if most < _LEAST_MEMORY else "ok", found, fix)


def memory_bytes(path: str = "/proc/meminfo") -> tuple[int | None, int | None]:
    """(total, available) memory of the machine by the table of the kernel."""
    try:
        rows = dict(line.split(":", 1) for line in Path(path).read_text().splitlines() if ":" in line)
        total, available = (int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError, IndexError):
        return None, None
    return total, available


def _container_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):
            continue
    return None


def shared_memory(folder: str = _SHM) -> Iterator[Check]:
    """Space for the object store of `ray start`; ckd-ray itself takes half a GiB."""
    if not os.path.isdir(folder):
        return
    size = shutil.disk_usage(folder).total
    _, available = memory_bytes()
    wanted = int((available or 0) * _STORE_SHARE)
    found = f"{size / GIB:.2f} GiB at {folder}; `ray start` takes by default {wanted / GIB:.2f}"
    if size < min(wanted, 512 * 2**20):
        fix = "Ray would use the disk, which is slow: docker run --shm-size=4g (Kubernetes: an emptyDir in Memory)"
        yield Check("shared memory", "fail", found, fix)
    elif size < wanted:
        store = max(size // 2, 80 * 2**20)
        fix = f"start Ray with --object-store-memory={store}, or give the container more (--shm-size)"
        yield Check("shared memory", "warn", found, fix)
    else:
        yield Check("shared memory", "ok", found)


def accelerators() -> Iterator[Check]:
    """The GPUs that PyTorch sees, and whether Ray and the driver see as many."""
    import torch
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    driver = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if os.path.isdir("/proc/driver/nvidia/gpus") else 0
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver and not seen and hidden != "":
        fix = "install a build of torch for this driver's CUDA (https://pytorch.org), then: ckd-ray doctor"
        yield Check("gpu", "fail", f"the driver has {driver}, torch {torch.__version__} sees none", fix)
        return
    if not seen:
        yield Check("gpu", "ok", "none; encoders and training use the CPU")
        return
    names = []
    for i in range(seen):
        properties = torch.cuda.get_device_properties(i)
        names.append(f"{properties.name} ({properties.total_memory / GIB:.0f} GiB)")
    by_ray = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    allowed = seen if hidden is None else len([part for part in hidden.split(",") if part])
    found = f"{', '.join(names)}; {'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'no bf16'}"
    counted = min(by_ray, allowed)
    if counted != seen:
        yield Check("gpu", "warn", f"{found}; Ray would count {counted}", f"start Ray with --num-gpus={seen}")
    else:
        yield Check("gpu", "ok", found)


def hostname(*, several_machines: bool = False) -> Iterator[Check]:
    """The machine's own name. Training across machines connects to the address that it resolves to."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = ""
    if address and not ipaddress.ip_address(address).is_loopback:
        yield Check("host name", "ok", f"{name} is {address}")
        return
    found = f"{name} is {address}, which others cannot reach" if address else f"{name} has no address"
    fix = f"for training across machines: add a line `ADDRESS {name}` with the address of this machine to /etc/hosts"
    yield Check("host name", "fail" if several_machines else "warn", found, fix)
