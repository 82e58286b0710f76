"""What instance types are, and what they cost: for plans before anything is paid.

On-demand prices are list prices of us-east-1 (AWS) and us-central1 (GCP) in USD an hour as remembered in 2025, without
any discount; spot prices move by the hour, and are taken for `SPOT_SHARE` of them. Both are assumptions: name your own
with `--price TYPE=USD`. Peak rates are the makers' figures for dense products of 16-bit numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

SPOT_SHARE = 0.4


@dataclass(frozen=True)
class Accelerator:
    """teraflops: dense 16-bit products, peak; memory in GiB, bandwidth in GB/s."""

    teraflops: float
    memory_gib: float
    bandwidth: float


ACCELERATORS = {
    "T4": Accelerator(65, 16, 320),
    "V100": Accelerator(125, 16, 900),
    "A10G": Accelerator(70, 24, 600),
    "L4": Accelerator(121, 24, 300),
    "L40S": Accelerator(362, 48, 864),
    "A100": Accelerator(312, 40, 1555),
    "A100-80GB": Accelerator(312, 80, 2039),
    "H100": Accelerator(989, 80, 3350),
    "H200": Accelerator(989, 141, 4800),
}


@dataclass(frozen=True)
class Instance:
    """An instance type: vCPUs, memory, GPUs, network in Gbit/s, USD an hour on demand (None: not known)."""

    cpus: int
    memory_gib: float
    gpus: int = 0
    accelerator: str | None = None
    network_gbit: float = 10.0
    usd: float | None = None


INSTANCES = {
    "m5.xlarge": Instance(4, 16, usd=0.192),
    "m5.2xlarge": Instance(8, 32, usd=0.384),
    "m5.4xlarge": Instance(16, 64, usd=0.768),
    "m6i.xlarge": Instance(4, 16, network_gbit=12.5, usd=0.192),
    "m6i.2xlarge": Instance(8, 32, network_gbit=12.5, usd=0.384),
    "m6i.4xlarge": Instance(16, 64, network_gbit=12.5, usd=0.768),
    "r6i.2xlarge": Instance(8, 64, network_gbit=12.5, usd=0.504),
    "r6i.4xlarge": Instance(16, 128, network_gbit=12.5, usd=1.008),
    "g4dn.xlarge": Instance(4, 16, 1, "T4", 25, 0.526),
    "g4dn.2xlarge": Instance(8, 32, 1, "T4", 25, 0.752),
    "g4dn.12xlarge": Instance(48, 192, 4, "T4", 50, 3.912),
    "g5.xlarge": Instance(4, 16, 1, "A10G", 10, 1.006),
    "g5.2xlarge": Instance(8, 32, 1, "A10G", 10, 1.212),
    "g5.4xlarge": Instance(16, 64, 1, "A10G", 25, 1.624),
    "g5.12xlarge": Instance(48, 192, 4, "A10G", 40, 5.672),
    "g5.48xlarge": Instance(192, 768, 8, "A10G", 100, 16.288),
    "g6.xlarge": Instance(4, 16, 1, "L4", 10, 0.805),
    "g6.2xlarge": Instance(8, 32, 1, "L4", 10, 0.978),
    "g6.12xlarge": Instance(48, 192, 4, "L4", 40, 4.602),
    "g6e.xlarge": Instance(4, 32, 1, "L40S", 20, 1.861),
    "g6e.2xlarge": Instance(8, 64, 1, "L40S", 20, 2.242),
    "p3.2xlarge": Instance(8, 61, 1, "V100", 10, 3.06),
    "p4d.24xlarge": Instance(96, 1152, 8, "A100", 400, 21.96),
    "p5.48xlarge": Instance(192, 2048, 8, "H100", 3200, 55.04),
    "n2-standard-4": Instance(4, 16, usd=0.194),
    "n2-standard-8": Instance(8, 32, network_gbit=16, usd=0.388),
    "n1-standard-8": Instance(8, 30, network_gbit=16, usd=0.38),
    "g2-standard-4": Instance(4, 16, 1, "L4", 10, 0.707),
    "g2-standard-8": Instance(8, 32, 1, "L4", 16, 0.854),
    "a2-highgpu-1g": Instance(12, 85, 1, "A100", 24, 3.673),
    "a2-highgpu-8g": Instance(96, 680, 8, "A100", 100, 29.39),
    "a3-highgpu-8g": Instance(208, 1872, 8, "H100", 1000, 88.25),
}


def price(kind: str, spot: bool, given: dict[str, float] | None = None) -> float | None:
    """USD an hour; `given` prices count as they are, whatever the market. None where it is not known."""
    if given and kind in given:
        return given[kind]
    known = INSTANCES.get(kind)
    if known is None or known.usd is None:
        return None
    return known.usd * (SPOT_SHARE if spot else 1.0)
