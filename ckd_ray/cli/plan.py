"""`ckd-ray plan`: what a run would take, before anything is paid."""

from __future__ import annotations

from typing import Annotated

import typer

from ckd_ray.cli.command import CLUSTERS, ConfigOption, SetOption, command, put
from ckd_ray.progress import say


@command(CLUSTERS)
def plan(
    json_: bool,
    config: ConfigOption = None,
    set_: SetOption = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="A cluster file (YAML); this machine when left out.")
    ] = None,
    rates: Annotated[
        str | None, typer.Option("--rates", help="Rates from a file of --save-rates; measured here when left out.")
    ] = None,
    save_rates: Annotated[
        str | None, typer.Option("--save-rates", help="Keep the measured rates in this file.")
    ] = None,
    passages: Annotated[int | None, typer.Option("--passages", help="Instead of counting the collection.")] = None,
    queries: Annotated[int | None, typer.Option("--queries", help="Training queries, likewise.")] = None,
    tokens: Annotated[float | None, typer.Option("--tokens-per-passage", help="Mean length, likewise.")] = None,
    evaluated: Annotated[
        int | None,
        typer.Option("--eval-queries", help="Queries of an evaluated split, likewise; else 1,000."),
    ] = None,
    price: Annotated[
        list[str] | None, typer.Option("--price", help="USD an hour of a node type: g5.xlarge=0.45 (repeatable).")
    ] = None,
    prices: Annotated[
        str | None, typer.Option("--prices", help="A YAML file of prices; that of CKD_RAY_PRICES when left out.")
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option("--assume", help="Override what no measurement here gives: gpu_share=0.4 (repeatable)."),
    ] = None,
) -> None:
    """Time, memory, storage and cost of every stage, from a calibration here or from given rates."""
    from ckd_ray.checks import load_config
    from ckd_ray.jobs.prices import parse_prices
    from ckd_ray.plan.cluster import Prices
    from ckd_ray.plan.job import make_plan
    from ckd_ray.plan.rates import parse_assumptions
    from ckd_ray.plan.show import render
    from ckd_ray.plan.sizes import GivenSizes

    paid, assumed = Prices(parse_prices(price or []), prices), parse_assumptions(assume or [])
    planned = make_plan(
        load_config(config, set_ or []),
        cluster=cluster,
        rates=rates,
        keep=save_rates,
        given=GivenSizes(passages, queries, tokens, evaluated),
        prices=paid,
        assumed=assumed,
    )
    put(planned.to_dict()) if json_ else say(render(planned), always=True)
