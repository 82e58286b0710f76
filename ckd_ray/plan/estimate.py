"""From sizes, rates and a layout to the time, memory and storage of every stage. Arithmetic alone: no Ray, no clock.

A stage is a list of parts that follow one another, each with its seconds and with what it waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckd_ray.config import Config
from ckd_ray.plan.hardware import ACCELERATORS
from ckd_ray.plan.layout import Layout
from ckd_ray.plan.memory import stage_memory
from ckd_ray.plan.rates import Rates
from ckd_ray.plan.sizes import Sizes
from ckd_ray.plan.work import FOLDERS, stage_work, storage_units, unit_of

_BYTES = 1e9 / 8  # of a Gbit


@dataclass(frozen=True)
class Part:
    """Some seconds of a stage. waits: what would have to be faster; scales: it shrinks with more machines."""

    name: str
    seconds: float
    waits: str
    scales: bool = False


@dataclass(frozen=True)
class StagePlan:
    """A stage: its parts, bytes that it leaves in the run directory by folder, and peak bytes of its processes."""

    name: str
    parts: tuple[Part, ...]
    storage: dict[str, float]
    memory: dict[str, float]

    @property
    def seconds(self) -> float:
        """The parts one after the other."""
        return sum(part.seconds for part in self.parts)

    @property
    def bound(self) -> Part | None:
        """The longest part."""
        return max(self.parts, key=lambda part: part.seconds, default=None)


@dataclass(frozen=True)
class Plan:
    """All stages of a run from an empty directory, each done once and nothing lost."""

    stages: tuple[StagePlan, ...]

    @property
    def seconds(self) -> float:
        """Of the run."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def storage(self) -> float:
        """Bytes that the run directory holds at the end."""
        return sum(sum(stage.storage.values()) for stage in self.stages)

    @property
    def bound(self) -> StagePlan:
        """The longest stage."""
        return max(self.stages, key=lambda stage: stage.seconds)

    @property
    def serial_seconds(self) -> float:
        """What does not shrink with more machines: the driver's work, one server's, and processes that start."""
        return sum(part.seconds for stage in self.stages for part in stage.parts if not part.scales)


def estimate(config: Config, sizes: Sizes, rates: Rates, layout: Layout, assumed: Mapping[str, float]) -> Plan:
    """The plan of a run.

    Args:
        assumed: the assumptions of `rates.ASSUMPTIONS` by name.
    """
    stages = []
    for name in layout.stages:
        storage = {
            folder: fixed + each * storage_units(folder, config, sizes)
            for folder in FOLDERS[name]
            for fixed, each in [rates.storage.get(folder, (0.0, 0.0))]
            if folder != "index" or (layout.engine == "faiss" and not layout.remote)
        }
        parts = stage_parts(name, config, sizes, rates, layout, assumed)
        parts += network_parts(name, config, rates, layout, sum(storage.values()), assumed)
        memory = stage_memory(name, config, sizes, rates.shape, layout)
        stages.append(StagePlan(name, tuple(part for part in parts if part.seconds > 0), storage, memory))
    return Plan(tuple(stages))


def stage_parts(
    stage: str, config: Config, sizes: Sizes, rates: Rates, layout: Layout, assumed: Mapping[str, float]
) -> list[Part]:
    """Amount times cost of every unit, over the devices of the cluster instead of those that were measured.

    Training shrinks with GPUs alone: without any, one worker has the cores of one machine.
    """
    parts = [Part("read the source", sizes.read_seconds or 0.0, "driver")] if stage == "collection" else []
    for name, amount in stage_work(stage, config, sizes, layout).items():
        unit = unit_of(name)
        seconds = amount * (assumed[name] if name in assumed else rates.cost(name))
        if unit.lanes is not None:
            seconds *= rates.lanes.get(unit.lanes, 1.0) / layout.lanes(unit.lanes)
        scaling = ("encode", "exact", "centroids", "cores", *(("teacher", "distill") if layout.cluster.gpus else ()))
        parts.append(Part(unit.name, seconds, unit.waits, scales=unit.lanes in scaling))
    return parts


def network_parts(
    stage: str, config: Config, rates: Rates, layout: Layout, stored: float, assumed: Mapping[str, float]
) -> list[Part]:
    """Embeddings on their way to and from a remote storage, and the gradients of several workers: a ring of W workers
    moves 2 (W - 1) / W times 4 bytes a parameter through every link in each step.

    Args:
        stored: bytes that the stage writes.
    """
    if stage in ("teacher", "distill"):
        workers = layout.workers.get(stage, 1)
        steps = (config.teacher if stage == "teacher" else config.distill).steps
        # Ray packs workers onto one machine where it can.
        together = any(workers <= (node.gpus if layout.cluster.gpus else node.cpus) for node in layout.cluster.nodes)
        kind = ACCELERATORS.get(layout.cluster.accelerator or "")
        inside = assumed["gpu_nvlink_gbit" if kind and kind.nvlink else "gpu_link_gbit"]
        link = _BYTES * (inside if together else layout.cluster.network_gbit)
        seconds = steps * 2 * (workers - 1) / workers * 4 * rates.shape.parameters / link
        return [Part("exchange gradients", seconds, "network")]
    if not layout.remote or stage not in ("embed", "evaluate"):
        return []
    seconds = stored / (_BYTES * layout.cluster.network_gbit * len(layout.cluster.nodes))
    return [Part("write to the storage, and fetch from it", 2 * seconds, "network", scales=True)]
