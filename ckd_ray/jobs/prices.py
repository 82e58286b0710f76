"""What machines cost, roughly: public list prices in USD an hour, for the estimate before anything is started.

Figures are approximate list prices of AWS us-east-1 and GCP us-central1 for Linux as of November 2025, typed in from
memory of the vendors' public price lists and rounded; they were not fetched from anywhere. Spot prices move by the
hour; a usual value stands here. Disks, traffic and taxes are left out. `CKD_RAY_PRICES=FILE.yaml` overrides or adds
types:

    g6.xlarge: [0.805, 0.32]     # on demand, spot
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from ckd_ray.errors import UserError

AS_OF = "2025-11"
SOURCE = "approximate public list prices, AWS us-east-1 and GCP us-central1"
OVERRIDE_VARIABLE = "CKD_RAY_PRICES"


@dataclass(frozen=True)
class Price:
    """USD an hour."""

    on_demand: float
    spot: float


# type: (on demand, usual spot)
_TABLE: dict[str, tuple[float, float]] = {
    # AWS, CPU
    "m5.large": (0.096, 0.04),
    "m5.xlarge": (0.192, 0.08),
    "m5.2xlarge": (0.384, 0.16),
    "m5.4xlarge": (0.768, 0.32),
    "m6i.large": (0.096, 0.04),
    "m6i.xlarge": (0.192, 0.08),
    "m6i.2xlarge": (0.384, 0.16),
    "m6i.4xlarge": (0.768, 0.32),
    "r6i.2xlarge": (0.504, 0.2),
    "r6i.4xlarge": (1.008, 0.4),
    "c6i.4xlarge": (0.68, 0.28),
    "c6i.8xlarge": (1.36, 0.56),
    # AWS, GPU: g4dn T4, g5 A10G, g6 L4, g6e L40S, p4d and p4de 8 A100, p5 8 H100
    "g4dn.xlarge": (0.526, 0.2),
    "g4dn.2xlarge": (0.752, 0.29),
    "g4dn.12xlarge": (3.912, 1.5),
    "g5.xlarge": (1.006, 0.45),
    "g5.2xlarge": (1.212, 0.55),
    "g5.4xlarge": (1.624, 0.7),
    "g5.12xlarge": (5.672, 2.5),
    "g5.48xlarge": (16.288, 7.0),
    "g6.xlarge": (0.805, 0.35),
    "g6.2xlarge": (0.978, 0.42),
    "g6.12xlarge": (4.602, 2.0),
    "g6.48xlarge": (13.35, 5.8),
    "g6e.xlarge": (1.861, 0.85),
    "g6e.2xlarge": (2.242, 1.0),
    "g6e.12xlarge": (10.493, 4.7),
    "p3.2xlarge": (3.06, 1.1),
    "p4d.24xlarge": (21.96, 10.0),
    "p4de.24xlarge": (27.45, 13.0),
    "p5.48xlarge": (55.04, 25.0),
    # GCP; g2 and a2, a3 include their GPUs (L4, A100, H100)
    "n2-standard-4": (0.194, 0.05),
    "n2-standard-8": (0.388, 0.1),
    "n2-standard-16": (0.777, 0.2),
    "n1-standard-4": (0.19, 0.04),
    "n1-standard-8": (0.38, 0.08),
    "e2-standard-4": (0.134, 0.05),
    "e2-standard-8": (0.268, 0.1),
    "g2-standard-4": (0.707, 0.28),
    "g2-standard-8": (0.854, 0.34),
    "g2-standard-12": (1.0, 0.4),
    "g2-standard-48": (4.0, 1.6),
    "g2-standard-96": (8.0, 3.2),
    "a2-highgpu-1g": (3.673, 1.6),
    "a2-highgpu-8g": (29.39, 12.8),
    "a3-highgpu-8g": (88.25, 30.0),
    # GCP, GPUs that are attached to an n1 machine, each
    "nvidia-tesla-t4": (0.35, 0.14),
    "nvidia-tesla-v100": (2.48, 0.92),
}


def price_of(kind: str) -> Price | None:
    """The price of a machine type or of one attached accelerator; None where it is unknown.

    Raises:
        UserError: the file of CKD_RAY_PRICES cannot be used.
    """
    found = _overrides().get(kind) or _TABLE.get(kind)
    return Price(*found) if found else None


def hourly(kind: str, *, spot: bool, accelerators: dict[str, int] | None = None) -> float | None:
    """USD an hour of one machine with its attached accelerators; None when a part's price is unknown."""
    parts = [(kind, 1), *(accelerators or {}).items()]
    prices = [(price_of(name), count) for name, count in parts]
    if any(price is None for price, _ in prices):
        return None
    return sum((price.spot if spot else price.on_demand) * count for price, count in prices if price)


def _overrides() -> dict[str, tuple[float, float]]:
    path = os.environ.get(OVERRIDE_VARIABLE)
    if not path:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return {str(kind): (float(both[0]), float(both[1])) for kind, both in values.items()}
    except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError, LookupError) as error:
        raise UserError(
            "this table of prices cannot be read",
            where=f"{OVERRIDE_VARIABLE}={path}",
            expected="a line a machine type: `g5.xlarge: [1.006, 0.45]`, USD an hour on demand and spot",
            found=(str(error).splitlines() or [type(error).__name__])[0],
        ) from None
