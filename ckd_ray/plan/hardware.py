"""What GPUs, instance types and well-known encoders are, for plans of hardware that is not here."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Accelerator:
    """A kind of GPU.

    Attributes:
        teraflops: peak of dense products in the precision that `auto` takes, from NVIDIA's data sheets (A10G: AWS):
            bfloat16, or float32 on those that have no bfloat16 (T4, V100).
        memory_gib: of its memory.
        nvlink: whether those of one machine are connected by it, as in the machines that clouds lend.
    """

    teraflops: float
    memory_gib: float
    nvlink: bool = False


ACCELERATORS = {
    "T4": Accelerator(8.1, 16),
    "V100": Accelerator(15.7, 16, nvlink=True),
    "A10G": Accelerator(70, 24),
    "L4": Accelerator(121, 24),
    "L40S": Accelerator(362, 48),
    "A100": Accelerator(312, 40, nvlink=True),
    "A100-80GB": Accelerator(312, 80, nvlink=True),
    "H100": Accelerator(989, 80, nvlink=True),
    "H200": Accelerator(989, 141, nvlink=True),
}
# GPUs that GCP attaches to a machine, by their names there.
ATTACHED = {"nvidia-tesla-t4": "T4", "nvidia-tesla-v100": "V100", "nvidia-l4": "L4", "nvidia-tesla-a100": "A100"}


@dataclass(frozen=True)
class Instance:
    """An instance type: vCPUs, memory, GPUs, network in Gbit/s."""

    cpus: int
    memory_gib: float
    gpus: int
    accelerator: str | None
    network_gbit: float


@cache
def instances() -> dict[str, Instance]:
    """The instance types of `instances.csv`, with the vendors' sizes."""
    text = (files("ckd_ray.plan") / "instances.csv").read_text(encoding="utf-8")
    return {
        row["type"]: Instance(
            int(row["cpus"]),
            float(row["memory_gib"]),
            int(row["gpus"]),
            row["accelerator"] or None,
            float(row["network_gbit"]),
        )
        for row in csv.DictReader(text.splitlines())
    }


@dataclass(frozen=True)
class Shape:
    """An encoder: all parameters, those of its embedding tables, its layers and its hidden size."""

    parameters: int
    embedding_parameters: int
    layers: int
    hidden: int

    def token_flops(self, tokens: float) -> float:
        """Operations of a token's forward pass among `tokens`: two for each parameter outside of the embedding tables,
        and four times the hidden size in every layer for the attention to each of the tokens."""
        return 2.0 * (self.parameters - self.embedding_parameters) + 4.0 * tokens * self.hidden * self.layers


_BASE, _LARGE = Shape(109_482_240, 23_837_184, 12, 768), Shape(335_141_888, 31_782_912, 24, 1024)
# By the last part of a hub id.
SHAPES = {
    "bert-base-uncased": _BASE,
    "msmarco-bert-base-dot-v5": _BASE,
    "colbertv2.0": _BASE,
    "bert-large-uncased": _LARGE,
    "distilbert-base-uncased": Shape(66_362_880, 23_835_648, 6, 768),
    "MiniLM-L12-H384-uncased": Shape(33_360_000, 11_919_360, 12, 384),
    "all-MiniLM-L6-v2": Shape(22_713_216, 11_917_824, 6, 384),
}


def accelerator_of(name: str) -> str | None:
    """`NVIDIA A100-SXM4-80GB` to `A100-80GB`; the name itself where it is none of `ACCELERATORS`."""
    parts = name.upper().replace(" ", "-").split("-")
    found = [kind for kind in ACCELERATORS if all(part in parts for part in kind.upper().split("-"))]
    return max(found, key=len) if found else name
