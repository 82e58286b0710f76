"""`ckd-ray plan` from options to a plan: counts or takes sizes, measures or takes rates, lays out, estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ckd_ray.config import Config, ModelConfig
from ckd_ray.errors import UserError
from ckd_ray.plan.hardware import ACCELERATORS, SHAPES
from ckd_ray.plan.rates import Rates, carried_over, for_backbone, load_rates, save_rates
from ckd_ray.plan.sizes import Sample, Sizes, count_collection, given_sizes, made_up_sample, with_tokens
from ckd_ray.progress import say

if TYPE_CHECKING:
    from ckd_ray.model import ColBERT
    from ckd_ray.plan.cluster import PlannedCluster
    from ckd_ray.plan.estimate import Layout, Plan

# Tokens of the sample that a counted collection is measured in when rates are given.
_LOOKED_AT = 288


@dataclass(frozen=True)
class GivenSizes:
    """`--passages`, `--queries`, `--tokens-per-passage`; all None when the collection is to be counted. evaluated:
    `--eval-queries`, with the others only."""

    passages: int | None = None
    queries: int | None = None
    tokens: float | None = None
    evaluated: int | None = None

    @property
    def complete(self) -> bool:
        """Whether all are given.

        Raises:
            UserError: some are, and some are not.
        """
        values = {"--passages": self.passages, "--queries": self.queries, "--tokens-per-passage": self.tokens}
        missing = [option for option, value in values.items() if value is None]
        if missing and (len(missing) < len(values) or self.evaluated is not None):
            raise UserError(
                "sizes come together",
                where=missing[0],
                expected=", ".join(values),
                found=f"no {' and no '.join(missing)}",
            )
        return not missing


@dataclass(frozen=True)
class Planned:
    """A plan and everything that it follows from."""

    plan: Plan
    sizes: Sizes
    rates: Rates
    cluster: PlannedCluster
    layout: Layout
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        from ckd_ray.plan.estimate import to_dict

        found = to_dict(self.plan, self.cluster.usd, self.sizes, self.rates, self.layout)
        return {**found, "cluster": self.cluster.to_dict(), "warnings": list(self.warnings)}


def make_plan(
    config: Config,
    *,
    cluster: str | None = None,
    rates: str | None = None,
    keep: str | None = None,
    given: GivenSizes | None = None,
    prices: dict[str, float] | None = None,
) -> Planned:
    """Plan a run of `config`.

    Args:
        cluster: a cluster file; this machine when None or `local`.
        rates: a rates file; measured here when None. keep: a file to write the measured rates to.
        prices: USD an hour by instance type.

    Raises:
        UserError: something that is given is wrong, or what is asked for does not fit the cluster.
    """
    from ckd_ray.plan.cluster import read_cluster, this_machine
    from ckd_ray.plan.estimate import estimate
    from ckd_ray.plan.layout import lay_out

    given = given or GivenSizes()
    if rates is not None and keep is not None:
        raise UserError("the rates are given already", where="--save-rates", fix="leave out --rates to measure anew")
    # What costs nothing comes first: a wrong file is refused before anything is counted or measured.
    known = load_rates(rates) if rates is not None else None
    machines = this_machine() if cluster in (None, "local") else read_cluster(str(cluster), prices)
    kind = machines.accelerator if machines.gpus else None
    if known is not None:
        carried_over(known, kind)
    elif kind is not None and kind not in ACCELERATORS and cluster not in (None, "local"):
        raise UserError("a GPU that is not known here", where="--cluster", expected=", ".join(ACCELERATORS), found=kind)
    if given.complete:
        lay_out(config, _given(config, given), machines)
    measured, sizes = _measured(config, given, known)
    if keep is not None:
        save_rates(measured, keep)
        say(f"plan: rates -> {keep}")
    carried = carried_over(for_backbone(measured, config.model.backbone, sizes.tokens), kind)
    layout = lay_out(config, sizes, machines)
    plan = estimate(config, sizes, carried, layout)
    return Planned(plan, sizes, carried, machines, layout, tuple(_warnings(config, plan, sizes, carried, layout)))


def _measured(config: Config, given: GivenSizes, known: Rates | None) -> tuple[Rates, Sizes]:
    """Rates and sizes, of which either may be given."""
    if known is not None:
        return known, (_given(config, given) if given.complete else _counted_with_tokens(config, given)[0])
    from ckd_ray.plan.measure import PASSAGES, QUERIES, measure

    config, model = _encoder(config)
    batch = max(config.teacher.batch_size, config.distill.batch_size)
    asked = max(QUERIES, batch)
    if given.complete:
        sizes = _given(config, given)
        words = single_token_words(model)
        sample = made_up_sample(words, sizes.tokens, config.model.doc_maxlen, max(PASSAGES, asked), asked)
        measured, found = measure(config, model, sizes, sample)
        return measured, with_tokens(found, sizes.tokens, sizes.kept)
    say("plan: counting the collection")
    sizes, sample = count_collection(config.collection, passages=PASSAGES, queries=asked, seed=config.run.seed)
    say(f"plan: {sizes.passages:,} passages, {sizes.all_queries:,} queries, read in {sizes.read_seconds:.0f} s")
    return measure(config, model, sizes, sample)


def _encoder(config: Config) -> tuple[Config, ColBERT]:
    """The encoder that is measured: that of the configuration, or where it is not here, but its shape is known, the
    small one that pip installs (the rates are then carried over). With the configuration that it belongs to."""
    from ckd_ray.plan.measure import load_model

    try:
        return config, load_model(config)
    except UserError as error:
        small = ModelConfig().backbone
        if config.model.backbone.rpartition("/")[2] not in SHAPES or config.model.backbone == small:
            raise
        say(f"plan: {config.model.backbone} cannot be loaded here; {small} is measured in its place")
        # Its own settings of the model's length may not fit; those of the configuration do.
        model = config.model.model_copy(update={"backbone": small})
        smaller = config.model_copy(
            update={"model": model, "teacher": config.teacher.model_copy(update={"checkpoint": None})}
        )
        try:
            return smaller, load_model(smaller)
        except UserError:
            raise error from None


def _given(config: Config, given: GivenSizes) -> Sizes:
    assert given.passages is not None and given.queries is not None and given.tokens is not None
    return given_sizes(given.passages, given.queries, given.tokens, config, given.evaluated)


def _counted_with_tokens(config: Config, given: GivenSizes) -> tuple[Sizes, Sample]:
    """The collection counted, its tokens by the tokenizer of the backbone."""
    from ckd_ray.plan.measure import QUERIES

    config, model = _encoder(config)
    sizes, sample = count_collection(config.collection, passages=_LOOKED_AT, queries=QUERIES, seed=config.run.seed)
    tokenizer = model.tokenizer
    tokens = tokenizer.passages([text for _, text in sample.passages])
    read = sum(len(ids) for ids in tokens) / len(tokens)
    kept = sum(int(tokenizer.keeps(ids).sum()) for ids in tokens) / len(tokens)
    return with_tokens(sizes, read, kept), sample


def single_token_words(model: ColBERT) -> list[str]:
    """Words of the vocabulary that are one token each."""
    vocabulary = model.tokenizer.hf.get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 3)
    return words[:: max(1, len(words) // 2000)] or ["word"]


def _warnings(config: Config, plan: Plan, sizes: Sizes, rates: Rates, layout: Layout) -> list[str]:
    """What would probably not go well, or what the plan cannot know."""
    found = []
    if rates.backbone != config.model.backbone:
        found.append(f"the rates are of {rates.backbone}, not of {config.model.backbone}")
    if rates.load > 0.5 * rates.cores:
        found.append(f"the machine was busy when the rates were measured (load {rates.load:g}): they are too slow")
    peaks = {name: max((stage.memory.get(name, 0.0), stage.name) for stage in plan.stages) for name in ("actor", "gpu")}
    kind = ACCELERATORS.get(layout.accelerator or "")
    size, stage = peaks["gpu"]
    if kind is not None and size > kind.memory_gib * 2**30:
        found.append(
            f"{stage}: {size / 2**30:.1f} GiB on a GPU of {kind.memory_gib:g} GiB; raise {stage}.accumulate"
            if stage in ("teacher", "distill")
            else f"{stage}: {size / 2**30:.1f} GiB on a GPU of {kind.memory_gib:g} GiB; lower embed.token_budget"
        )
    for stage_plan in plan.stages:
        share = {"embed": layout.actors, "retrieve": layout.retrieve.count}.get(stage_plan.name, 1) / layout.nodes
        held = stage_plan.memory.get("actor", 0.0) * max(1.0, share)
        if held > layout.smallest_node_gib * 2**30:
            found.append(
                f"{stage_plan.name}: {held / 2**30:.1f} GiB on a machine of {layout.smallest_node_gib:.0f} GiB"
            )
    if layout.nodes > 1 and not layout.remote:
        found.append("run.storage is a local path: on several machines it must be one that all see (s3://...)")
    return found


def parse_prices(values: Sequence[str]) -> dict[str, float]:
    """`TYPE=USD` of `--price`.

    Raises:
        UserError: not of that form.
    """
    found = {}
    for value in values:
        kind, equals, text = value.partition("=")
        try:
            usd = float(text)
        except ValueError:
            usd = -1.0
        if not equals or not kind or not 0 <= usd < 1e6:
            raise UserError(
                "not a price", where="--price", expected="TYPE=USD an hour, such as g5.xlarge=0.45", found=value
            )
        found[kind] = usd
    return found


def with_rates(planned: Planned, rates: Rates, config: Config) -> Planned:
    """The same plan at other rates."""
    from ckd_ray.plan.estimate import estimate

    return replace(planned, rates=rates, plan=estimate(config, planned.sizes, rates, planned.layout))
