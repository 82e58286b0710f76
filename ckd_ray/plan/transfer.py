"""Rates carried over to GPUs and encoders that were not measured. Every step is noted as an assumption."""

from __future__ import annotations

from collections.abc import Mapping

from ckd_ray.errors import UserError
from ckd_ray.plan.hardware import ACCELERATORS, SHAPES
from ckd_ray.plan.rates import Rates

# Work that a GPU does where the cluster has any.
_ON_GPU = ("token", "pair token", "exact product", "teacher token", "distill token")


def on_accelerator(rates: Rates, accelerator: str | None, assumed: Mapping[str, float]) -> Rates:
    """The rates for a cluster whose GPUs are of this kind (None: it has none).

    The same kind: as measured. Another kind: in the ratio of the peak rates. A GPU where a CPU was measured: at
    `gpu_share` of the peak rate, two operations a parameter and token forwards and twice that backwards.

    Raises:
        UserError: a GPU that is not known here, or rates of a GPU for a cluster without any.
    """
    if accelerator is None:
        if rates.device == "cuda":
            raise UserError(
                "these rates are of a GPU, and the cluster has none",
                where="--rates",
                expected="rates measured on a CPU",
                found=f"{rates.accelerator} ({rates.machine})",
            )
        return rates
    if rates.device == "cuda" and rates.accelerator == accelerator:
        return rates
    for where, kind in (("--cluster", accelerator), ("--rates", rates.accelerator)):
        if kind is not None and kind not in ACCELERATORS:
            expected = f"one of {', '.join(ACCELERATORS)}, or rates measured on it (--rates)"
            raise UserError("a GPU that is not known here", where=where, expected=expected, found=kind)
    peak = ACCELERATORS[accelerator].teraflops
    if rates.accelerator is not None:
        ratio = peak / ACCELERATORS[rates.accelerator].teraflops
        costs = {unit: cost / ratio if unit in _ON_GPU else cost for unit, cost in rates.costs.items()}
        text = f"{accelerator} at {ratio:.2f} times the measured {rates.accelerator} (ratio of their peak rates)"
        return rates.assuming(text, accelerator=accelerator, costs=costs)
    flops = peak * 1e12 * assumed["gpu_share"]
    token = rates.shape.token_flops(rates.tokens) / flops
    each = {"token": token, "pair token": token, "exact product": 2.0 * rates.dim / flops}
    each |= {"teacher token": 3 * token, "distill token": 3 * token, "step": assumed["gpu_step_s"]}
    text = (
        f"no {accelerator} was measured: {assumed['gpu_share']:.0%} of its peak of {peak:g} TFLOP/s, and at least "
        f"{assumed['gpu_step_s']:g} s a training step; override with --assume gpu_share=..., gpu_step_s=..."
    )
    return rates.assuming(
        text,
        device="cuda",
        accelerator=accelerator,
        costs={**rates.costs, **{unit: cost for unit, cost in each.items() if unit == "step" or unit in rates.costs}},
        lanes={**rates.lanes, **dict.fromkeys(("encode", "teacher", "distill", "exact"), 1.0)},
    )


def for_backbone(rates: Rates, backbone: str) -> Rates:
    """The rates for another encoder than was measured: times in proportion to the operations of a token.

    Only for encoders whose shape is known here; for others the rates stay as they are (and the plan warns).
    """
    shape = SHAPES.get(backbone.rpartition("/")[2])
    if backbone == rates.backbone or shape is None:
        return rates
    ratio = shape.token_flops(rates.tokens) / rates.shape.token_flops(rates.tokens)
    costs = {unit: cost * ratio if unit.endswith("token") else cost for unit, cost in rates.costs.items()}
    larger = shape.parameters / rates.shape.parameters
    storage = {
        folder: (fixed * larger if folder in ("teacher", "student") else fixed, each)
        for folder, (fixed, each) in rates.storage.items()
    }
    text = f"{backbone} was not measured: {ratio:.2f} times the operations a token of {rates.backbone}"
    return rates.assuming(text, backbone=backbone, shape=shape, costs=costs, storage=storage)
