"""What a calibration has found: seconds and bytes for each unit of work, kept in a JSON file.

Units are those of `work.py`. What no calibration here can know is an assumption: it has a name and a default, and
`--assume NAME=NUMBER` overrides it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from ckd_ray import __version__
from ckd_ray.errors import UserError, first_mistake
from ckd_ray.plan.hardware import Shape

FORMAT = 2
_MAKE = "ckd-ray plan --save-rates FILE, on the machine to be measured"
# Numbers that a calibration cannot give.
ASSUMPTIONS = {
    # Share of its peak rate that a GPU reaches where none was measured, and seconds that a training step takes on it at
    # least, starting its kernels: guesses that no measurement of ours backs. --rates of one such machine is better.
    "gpu_share": 0.25,
    "gpu_step_s": 0.06,
    # Gbit/s between the GPUs of one machine without NVLink: a fifth of PCIe 4.0 x16, through the host's memory.
    "gpu_link_gbit": 50,
    # Gbit/s between GPUs with NVLink: two thirds of the V100's 1,200 in one direction. An A100 has twice that.
    "gpu_nvlink_gbit": 800,
    # Seconds a token of the corpus, and a passage and query, in BM25: one core of a Xeon (Sapphire Rapids), 200,000
    # passages.
    "bm25_token_s": 1e-6,
    "bm25_score_s": 1.5e-8,
}
# Seconds or bytes a unit, or a number of devices.
_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def parse_assumptions(values: Sequence[str]) -> dict[str, float]:
    """`NAME=NUMBER` of `--assume`, over the defaults.

    Raises:
        UserError: a value has another form.
    """
    found = dict(ASSUMPTIONS)
    for value in values:
        name, _, text = value.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if name not in found or not 0 < number < 1e9:
            expected = f"NAME=NUMBER; names are {', '.join(found)}"
            raise UserError("not an assumption", where="--assume", expected=expected, found=value)
        found[name] = number
    return found


@dataclass(frozen=True)
class Rates:
    """Measured rates.

    Attributes:
        machine, cores, device (`cpu` or `cuda`), accelerator, version: where they were measured, and by which ckd-ray.
        backbone, shape, dim, tokens: the encoder, its projection, and the tokens of a passage.
        costs: seconds a unit of work, by the names of `work.py`.
        lanes: devices that shared the work of each kind then (`Layout.lanes`).
        storage: for each folder of a run, its fixed bytes and its bytes a unit (`work.storage_units`).
        seconds: that the calibration took. load: processes that wanted to run when it began.
        observations: the stages that were run, with their work and their seconds.
        assumptions: what was carried over to hardware or an encoder that was not measured.
    """

    machine: str
    cores: int
    device: str
    accelerator: str | None
    backbone: str
    shape: Shape
    dim: int
    tokens: float
    costs: dict[str, _Rate]
    lanes: dict[str, _Rate]
    storage: dict[str, tuple[_Rate, _Rate]]
    version: str = __version__
    seconds: float = 0.0
    load: float = 0.0
    observations: tuple[dict[str, Any], ...] = ()
    assumptions: tuple[str, ...] = field(default_factory=tuple)

    def cost(self, unit: str) -> float:
        """Seconds of one unit.

        Raises:
            UserError: the calibration ran with another configuration, which has no such work.
        """
        if unit not in self.costs:
            raise UserError(
                "these rates are of another configuration",
                where="--rates",
                expected=f"a rate of `{unit}`",
                found=", ".join(self.costs),
                fix="calibrate with this configuration: ckd-ray plan --config ... --save-rates FILE",
            )
        return self.costs[unit]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"format": FORMAT, **asdict(self)}

    def assuming(self, text: str, **changes: Any) -> Rates:
        """These rates with some changed, and the reason noted."""
        return replace(self, assumptions=(*self.assumptions, text), **changes)


def save_rates(rates: Rates, path: str) -> None:
    """Write a rates file. Raises UserError when it cannot be written."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(rates.to_dict(), file, indent=2)
            file.write("\n")
    except OSError as error:
        raise UserError("the rates cannot be written", where=path, found=error.strerror) from None


def load_rates(path: str) -> Rates:
    """Read a rates file.

    Raises:
        UserError: it cannot be read, is of another format, or lacks a rate.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError("the rates cannot be read", where=path, found=str(reason), fix=_MAKE) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise UserError("not a rates file", where=path, expected=f"format {FORMAT}", found=str(found), fix=_MAKE)
    try:
        return TypeAdapter(Rates).validate_json(text, strict=True)
    except ValidationError as error:
        raise UserError("rates are missing or broken", where=path, found=first_mistake(error), fix=_MAKE) from None
