"""What instance types, GPUs and well-known encoders are, for plans of hardware that is not at hand.

Sizes are the vendors'; peak rates are the makers' figures for dense products of 16-bit numbers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """teraflops: dense 16-bit products, peak; memory in GiB."""

    teraflops: float
    memory_gib: float


ACCELERATORS = {
    "T4": Accelerator(65, 16),
    "V100": Accelerator(125, 16),
    "A10G": Accelerator(70, 24),
    "L4": Accelerator(121, 24),
    "L40S": Accelerator(362, 48),
    "A100": Accelerator(312, 40),
    "A100-80GB": Accelerator(312, 80),
    "H100": Accelerator(989, 80),
    "H200": Accelerator(989, 141),
}


@dataclass(frozen=True)
class Instance:
    """An instance type: vCPUs, memory, GPUs, network in Gbit/s."""

    cpus: int
    memory_gib: float
    gpus: int = 0
    accelerator: str | None = None
    network_gbit: float = 10.0


INSTANCES = {
    "m5.xlarge": Instance(4, 16),
    "m5.2xlarge": Instance(8, 32),
    "m5.4xlarge": Instance(16, 64),
    "m6i.xlarge": Instance(4, 16, network_gbit=12.5),
    "m6i.2xlarge": Instance(8, 32, network_gbit=12.5),
    "m6i.4xlarge": Instance(16, 64, network_gbit=12.5),
    "r6i.2xlarge": Instance(8, 64, network_gbit=12.5),
    "r6i.4xlarge": Instance(16, 128, network_gbit=12.5),
    "g4dn.xlarge": Instance(4, 16, 1, "T4", 25),
    "g4dn.2xlarge": Instance(8, 32, 1, "T4", 25),
    "g4dn.12xlarge": Instance(48, 192, 4, "T4", 50),
    "g5.xlarge": Instance(4, 16, 1, "A10G", 10),
    "g5.2xlarge": Instance(8, 32, 1, "A10G", 10),
    "g5.4xlarge": Instance(16, 64, 1, "A10G", 25),
    "g5.12xlarge": Instance(48, 192, 4, "A10G", 40),
    "g5.48xlarge": Instance(192, 768, 8, "A10G", 100),
    "g6.xlarge": Instance(4, 16, 1, "L4", 10),
    "g6.2xlarge": Instance(8, 32, 1, "L4", 10),
    "g6.12xlarge": Instance(48, 192, 4, "L4", 40),
    "g6e.xlarge": Instance(4, 32, 1, "L40S", 20),
    "g6e.2xlarge": Instance(8, 64, 1, "L40S", 20),
    "p3.2xlarge": Instance(8, 61, 1, "V100", 10),
    "p4d.24xlarge": Instance(96, 1152, 8, "A100", 400),
    "p5.48xlarge": Instance(192, 2048, 8, "H100", 3200),
    "n2-standard-4": Instance(4, 16),
    "n2-standard-8": Instance(8, 32, network_gbit=16),
    "n1-standard-8": Instance(8, 30, network_gbit=16),
    "g2-standard-4": Instance(4, 16, 1, "L4", 10),
    "g2-standard-8": Instance(8, 32, 1, "L4", 16),
    "a2-highgpu-1g": Instance(12, 85, 1, "A100", 24),
    "a2-highgpu-8g": Instance(96, 680, 8, "A100", 100),
    "a3-highgpu-8g": Instance(208, 1872, 8, "H100", 1000),
    "m5.large": Instance(2, 8),
    "m6i.large": Instance(2, 8, network_gbit=12.5),
    "c6i.4xlarge": Instance(16, 32, network_gbit=12.5),
    "c6i.8xlarge": Instance(32, 64, network_gbit=12.5),
    "g6.48xlarge": Instance(192, 768, 8, "L4", 100),
    "g6e.12xlarge": Instance(48, 384, 4, "L40S", 100),
    "p4de.24xlarge": Instance(96, 1152, 8, "A100-80GB", 400),
    "n2-standard-16": Instance(16, 64, network_gbit=32),
    "n1-standard-4": Instance(4, 15),
    "e2-standard-4": Instance(4, 16),
    "e2-standard-8": Instance(8, 32, network_gbit=16),
    "g2-standard-12": Instance(12, 48, 1, "L4", 16),
    "g2-standard-48": Instance(48, 192, 4, "L4", 50),
    "g2-standard-96": Instance(96, 384, 8, "L4", 100),
}
# GPUs that GCP attaches to a machine, by their names there.
ATTACHED = {"nvidia-tesla-t4": "T4", "nvidia-tesla-v100": "V100", "nvidia-l4": "L4", "nvidia-tesla-a100": "A100"}


@dataclass(frozen=True)
class Shape:
    """An encoder: parameters of all and of its embedding tables, layers, hidden numbers."""

    parameters: int
    embedding_parameters: int
    layers: int
    hidden: int

    def token_flops(self, tokens: float) -> float:
        """Operations of a token's forward pass among `tokens`: 2 a parameter outside of the tables, and attention."""
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
