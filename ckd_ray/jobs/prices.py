"""What machines cost, in USD an hour. The prices are the user's own: none come with the package.

A file of prices has a line for each machine type, and for each accelerator that is attached to a machine. It gives one
price, or the price on demand and the spot price:

    g6.xlarge: [0.80, 0.32]
    n2-standard-8: 0.39

`CKD_RAY_PRICES=FILE.yaml` names it for every command; `ckd-ray plan` also takes `--prices FILE` and `--price TYPE=USD`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ckd_ray.errors import UserError, first_line

PRICES_VARIABLE = "CKD_RAY_PRICES"


@dataclass(frozen=True)
class Price:
    """USD an hour."""

    on_demand: float
    spot: float


def hourly(
    kind: str, *, spot: bool, accelerators: dict[str, int] | None = None, file: str | None = None
) -> float | None:
    """USD an hour of one machine with its attached accelerators; None when the price of a part is unknown.

    Args:
        file: a file of prices; that of CKD_RAY_PRICES when None.

    Raises:
        UserError: the file cannot be used.
    """
    known = _read(file)
    parts = [(kind, 1), *(accelerators or {}).items()]
    if any(name not in known for name, _ in parts):
        return None
    return sum((known[name].spot if spot else known[name].on_demand) * count for name, count in parts)


def parse_prices(values: Sequence[str]) -> dict[str, float]:
    """`TYPE=USD` of `--price`: a node of that type, with everything attached to it.

    Raises:
        UserError: a value has another form.
    """
    found = {}
    for value in values:
        kind, equals, text = value.rpartition("=")
        try:
            usd = float(text)
        except ValueError:
            usd = -1.0
        if not equals or not kind or not 0 <= usd < 1e6:
            expected = "NODE_TYPE=USD_PER_HOUR, such as g5.xlarge=0.45"
            raise UserError("not a price", where="--price", expected=expected, found=value)
        found[kind] = usd
    return found


def _read(file: str | None) -> dict[str, Price]:
    path = file or os.environ.get(PRICES_VARIABLE)
    if not path:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return {str(kind): _price(value) for kind, value in values.items()}
    except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError, LookupError) as error:
        raise UserError(
            "this file of prices cannot be read",
            where=f"--prices {path}" if file else f"{PRICES_VARIABLE}={path}",
            expected="a line a machine type: `g5.xlarge: [1.0, 0.45]`, USD an hour on demand and spot, or one number",
            found=first_line(error),
        ) from None


def _price(value: Any) -> Price:
    both = value if isinstance(value, list) else [value, value]
    price = Price(float(both[0]), float(both[1]))
    if not (price.on_demand >= 0 and price.spot >= 0):
        raise ValueError(f"{value} is not a price")
    return price
