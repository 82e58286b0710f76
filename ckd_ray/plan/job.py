"""What `ckd-ray plan` does: counts, calibrates or reads rates, lays out, estimates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckd_ray.config import Config
from ckd_ray.errors import UserError
from ckd_ray.plan.hardware import ACCELERATORS
from ckd_ray.plan.rates import Rates, load_rates, parse_assumptions, save_rates
from ckd_ray.plan.sizes import GivenSizes, Sizes, count_collection, synthetic_sample
from ckd_ray.plan.transfer import for_backbone, on_accelerator
from ckd_ray.progress import say

if TYPE_CHECKING:
    from ckd_ray.plan.cluster import PlannedCluster, Prices
    from ckd_ray.plan.estimate import Plan
    from ckd_ray.plan.layout import Layout


@dataclass(frozen=True)
class Planned:
    """A plan and everything that it follows from."""

    plan: Plan
    sizes: Sizes
    rates: Rates
    layout: Layout
    warnings: tuple[str, ...] = ()
    assumed: Mapping[str, float] = field(default_factory=dict)

    @property
    def cluster(self) -> PlannedCluster:
        """The machines."""
        return self.layout.cluster

    def node_hours(self, seconds: float) -> float:
        """All machines are there as long as a stage lasts, whether they work or not."""
        return self.cluster.count * seconds / 3600

    def cost(self, seconds: float) -> float | None:
        """USD; None where a price is unknown."""
        return None if self.cluster.usd is None else self.cluster.usd * seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """As JSON: seconds, bytes, node hours and USD of every stage with its parts, and what bounds."""
        plan, longest = self.plan, self.plan.bound
        peaks = {name: max(stage.memory.get(name, 0.0) for stage in plan.stages) for name in ("driver", "actor", "gpu")}
        stages = [
            {
                "stage": stage.name,
                **self._paid(stage.seconds),
                "bound": stage.bound.waits if stage.bound else None,
                "parts": [
                    {"name": p.name, "seconds": round(p.seconds, 2), "waits_for": p.waits, "scales": p.scales}
                    for p in stage.parts
                ],
                "storage_bytes": {name: round(size) for name, size in stage.storage.items()},
                "memory_bytes": {name: round(size) for name, size in stage.memory.items()},
            }
            for stage in plan.stages
        ]
        return {
            "stages": stages,
            **self._paid(plan.seconds),
            "serial_seconds": round(plan.serial_seconds, 1),
            "storage_bytes": round(plan.storage),
            "memory_bytes": {name: round(size) for name, size in peaks.items() if size},
            "bound": {"stage": longest.name, "waits_for": longest.bound.waits if longest.bound else None},
            "collection": vars(self.sizes),
            "layout": self.layout.to_dict(),
            "rates": self.rates.to_dict(),
            "assumptions": list(self.rates.assumptions),
            "assumed": dict(self.assumed),
            "cluster": self.cluster.to_dict(),
            "warnings": list(self.warnings),
        }

    def _paid(self, seconds: float) -> dict[str, float | None]:
        usd = self.cost(seconds)
        return {
            "seconds": round(seconds, 1),
            "node_hours": round(self.node_hours(seconds), 3),
            "cost_usd": None if usd is None else round(usd, 2),
        }


def make_plan(
    config: Config,
    *,
    cluster: str | None = None,
    rates: str | None = None,
    keep: str | None = None,
    given: GivenSizes | None = None,
    prices: Prices | None = None,
    assumed: Mapping[str, float] | None = None,
) -> Planned:
    """Plan a run of `config`.

    Args:
        cluster: a cluster file; this machine when None or `local`.
        rates: a rates file; the calibration runs here when None.
        keep: a file to write the calibrated rates to.
        assumed: what no calibration gives (`rates.ASSUMPTIONS`); the defaults when None.

    Raises:
        UserError: something that is given is wrong, or what is asked for does not fit the cluster.
    """
    from ckd_ray.plan.cluster import this_machine
    from ckd_ray.plan.cluster_file import read_cluster
    from ckd_ray.plan.estimate import estimate
    from ckd_ray.plan.layout import lay_out

    assumed = assumed or parse_assumptions([])
    known_sizes = (given or GivenSizes()).sizes(config)
    if rates is not None and keep is not None:
        raise UserError("the rates are given already", where="--save-rates", fix="leave out --rates to measure anew")
    # What costs nothing comes first: a wrong file is refused before anything is counted or measured.
    known = load_rates(rates) if rates is not None else None
    machines = this_machine(prices) if cluster in (None, "local") else read_cluster(str(cluster), prices)
    kind = machines.accelerator if machines.gpus else None
    if known is not None:
        on_accelerator(known, kind, assumed)
    elif kind is not None and kind not in ACCELERATORS and cluster not in (None, "local"):
        raise UserError("a GPU that is not known here", where="--cluster", expected=", ".join(ACCELERATORS), found=kind)
    if known_sizes is not None:
        lay_out(config, known_sizes, machines)
    measured, sizes = _measured(config, known_sizes, known)
    if keep is not None:
        save_rates(measured, keep)
        say(f"plan: rates -> {keep}")
    carried = on_accelerator(for_backbone(measured, config.model.backbone), kind, assumed)
    layout = lay_out(config, sizes, machines)
    plan = estimate(config, sizes, carried, layout, assumed)
    told = (*_warnings(config, plan, carried, layout), *_price_warnings(machines, prices))
    return Planned(plan, sizes, carried, layout, told, assumed)


def _measured(config: Config, sizes: Sizes | None, rates: Rates | None) -> tuple[Rates, Sizes]:
    """Rates and sizes, of which either may be given."""
    if rates is not None and sizes is not None:
        return rates, sizes
    from ckd_ray.plan.calibrate import calibrate, sample_sizes
    from ckd_ray.plan.encoder import TOKENISED, load_encoder, single_token_words, with_tokens

    encoder, model = load_encoder(config)
    if sizes is not None:
        wanted, words = sample_sizes(config, sizes), single_token_words(model)
        sample = synthetic_sample(words, sizes.tokens, config.model.doc_maxlen, wanted.passages, wanted.queries)
    else:
        say("plan: counting the collection")
        wanted = sample_sizes(config)
        asked = (TOKENISED, 1) if rates is not None else (wanted.passages, wanted.queries)
        sizes, sample = count_collection(config.collection, passages=asked[0], queries=asked[1], seed=config.run.seed)
        say(f"plan: {sizes.passages:,} passages, {sizes.all_queries:,} queries, read in {sizes.read_seconds:.0f} s")
        sizes = with_tokens(sizes, sample, model)
    return rates or calibrate(encoder, sizes, sample, model), sizes


def _warnings(config: Config, plan: Plan, rates: Rates, layout: Layout) -> Iterator[str]:
    """What would probably not go well, or what the plan cannot know."""
    from ckd_ray import __version__

    if rates.backbone != config.model.backbone:
        yield f"the rates are of {rates.backbone}, not of {config.model.backbone}"
    if rates.version != __version__:
        yield f"the rates are of ckd-ray {rates.version}, not of {__version__}"
    if rates.load > 0.5 * rates.cores:
        yield f"the machine was busy when the rates were measured (load {rates.load:g}): they are too slow"
    kind = ACCELERATORS.get(layout.cluster.accelerator or "")
    size, stage = max((stage.memory.get("gpu", 0.0), stage.name) for stage in plan.stages)
    if kind is not None and size > kind.memory_gib * 2**30:
        training = f"raise {stage}.accumulate, or set {stage}.gradient_checkpointing: true"
        fix = training if stage in ("teacher", "distill") else "lower embed.token_budget"
        yield f"{stage}: {size / 2**30:.1f} GiB on a GPU of {kind.memory_gib:g} GiB; {fix}"
    actors = {"embed": layout.pool.actors, "retrieve": layout.servers[layout.engine].servers}
    for planned in plan.stages:
        held = planned.memory.get("actor", 0.0) * max(1.0, actors.get(planned.name, 1) / len(layout.cluster.nodes))
        if held > layout.cluster.smallest_gib * 2**30:
            yield f"{planned.name}: {held / 2**30:.1f} GiB on a machine of {layout.cluster.smallest_gib:.0f} GiB"
    if len(layout.cluster.nodes) > 1 and not layout.remote:
        yield "run.storage is a local path: on several machines it must be one that all see (s3://...)"


def _price_warnings(cluster: PlannedCluster, prices: Prices | None) -> Iterator[str]:
    """Prices that no machine has, which are most likely slips."""
    names = [name for m in cluster.groups for name in (m.name, m.node_type) if name]
    for name in prices.given if prices else ():
        if name not in names:
            yield f"--price {name}: the cluster has no such node type; it has {', '.join(dict.fromkeys(names))}"
