"""Prices of instance types, roughly: list prices in USD an hour, for a plan before anything is paid.

AWS us-east-1 and GCP us-central1, Linux, as known in 2025 and not looked up since; spot prices move by the hour and are
taken for `_SPOT` of them. Both are assumptions: `--price TYPE=USD` names what you pay.
"""

from __future__ import annotations

_SPOT = 0.43
_ON_DEMAND = {
    "m5.xlarge": 0.192,
    "m5.2xlarge": 0.384,
    "m5.4xlarge": 0.768,
    "m6i.xlarge": 0.192,
    "m6i.2xlarge": 0.384,
    "m6i.4xlarge": 0.768,
    "r6i.2xlarge": 0.504,
    "r6i.4xlarge": 1.008,
    "g4dn.xlarge": 0.526,
    "g4dn.2xlarge": 0.752,
    "g4dn.12xlarge": 3.912,
    "g5.xlarge": 1.006,
    "g5.2xlarge": 1.212,
    "g5.4xlarge": 1.624,
    "g5.12xlarge": 5.672,
    "g5.48xlarge": 16.288,
    "g6.xlarge": 0.805,
    "g6.2xlarge": 0.978,
    "g6.12xlarge": 4.602,
    "g6e.xlarge": 1.861,
    "g6e.2xlarge": 2.242,
    "p3.2xlarge": 3.06,
    "p4d.24xlarge": 21.96,
    "p5.48xlarge": 55.04,
    "n2-standard-4": 0.194,
    "n2-standard-8": 0.388,
    "n1-standard-8": 0.38,
    "g2-standard-4": 0.707,
    "g2-standard-8": 0.854,
    "a2-highgpu-1g": 3.673,
    "a2-highgpu-8g": 29.39,
    "a3-highgpu-8g": 88.25,
    "m5.large": 0.096,
    "m6i.large": 0.096,
    "c6i.4xlarge": 0.68,
    "c6i.8xlarge": 1.36,
    "g6.48xlarge": 13.35,
    "g6e.12xlarge": 10.493,
    "p4de.24xlarge": 27.45,
    "n2-standard-16": 0.777,
    "n1-standard-4": 0.19,
    "e2-standard-4": 0.134,
    "e2-standard-8": 0.268,
    "g2-standard-12": 1.0,
    "g2-standard-48": 4.0,
    "g2-standard-96": 8.0,
    "nvidia-tesla-t4": 0.35,
    "nvidia-tesla-v100": 2.48,
}


def hourly(kind: str, *, spot: bool, accelerators: dict[str, int] | None = None) -> float | None:
    """USD an hour of one machine with its attached accelerators; None when a part's price is unknown."""
    parts = [(kind, 1), *(accelerators or {}).items()]
    if any(name not in _ON_DEMAND for name, _ in parts):
        return None
    return sum(_ON_DEMAND[name] * count for name, count in parts) * (_SPOT if spot else 1.0)
