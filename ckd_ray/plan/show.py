"""A plan as people read it: a line a stage, what bounds, what was assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckd_ray.progress import duration

if TYPE_CHECKING:
    from ckd_ray.plan.cluster import Machines
    from ckd_ray.plan.job import Planned

HOW_TO_PRICE = "no price is known: add --price NODE_TYPE=USD_PER_HOUR or --prices FILE"


def size(count: float) -> str:
    """`3.4 GB`, in powers of 1,000 as storage is sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def money(usd: float | None) -> str:
    """`$ 1.20`, or a dash."""
    return "-" if usd is None else f"$ {usd:,.2f}"


def render(planned: Planned) -> str:
    """The table, and the lines below it."""
    plan, sizes, cluster, layout = planned.plan, planned.sizes, planned.cluster, planned.layout
    how = "counted" if sizes.counted else "given"
    machines = ", ".join(f"{m.count} x {_machine(m)}" for m in cluster.groups if m.count)
    paid = HOW_TO_PRICE if cluster.usd is None else f"{money(cluster.usd)} an hour"
    lines = [
        f"collection: {sizes.passages:,} passages of {sizes.tokens:.0f} tokens ({sizes.kept:.0f} stored), "
        f"{sizes.queries.get('train', 0):,} training queries ({how})",
        f"cluster: {machines}; {paid}",
        f"rates: {planned.rates.machine}, {planned.rates.backbone}",
        f"ways: {layout.pool.actors} encoders, "
        f"search by {layout.engine} ({layout.servers[layout.engine].servers} servers), "
        f"votes by {layout.votes}, {layout.workers['distill']} training workers",
        "",
        *_table(planned),
    ]
    longest = plan.bound
    part = longest.bound
    lines += [
        "",
        f"{longest.name} bounds: {longest.seconds / max(plan.seconds, 1e-9):.0%} of the time"
        + (f", and most of that is {part.name} (waits for: {part.waits})" if part else ""),
        f"{duration(plan.serial_seconds)} would not shrink with more machines",
    ]
    lines += [f"assumed: {text}" for text in planned.rates.assumptions]
    lines += [f"warning: {text}" for text in planned.warnings]
    return "\n".join(lines)


def _table(planned: Planned) -> list[str]:
    plan = planned.plan
    head = ("stage", "time", "node hours", "cost", "storage", "driver", "actor", "GPU", "waits for")
    rows: list[tuple[str, ...]] = [head]
    for stage in plan.stages:
        bound = f"{stage.bound.waits}: {stage.bound.name}" if stage.bound else ""
        memory = [_memory(stage.memory.get(name)) for name in ("driver", "actor", "gpu")]
        stored = size(sum(stage.storage.values()))
        rows.append((stage.name, *_paid(planned, stage.seconds), stored, *memory, bound))
    rows.append(("all", *_paid(planned, plan.seconds), size(plan.storage), "", "", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    cells = [[c.rjust(w) for c, w in zip(row, widths, strict=True)] for row in rows]
    return [
        "  ".join([row[0].ljust(widths[0]), *c[1:-1], row[-1]]).rstrip() for row, c in zip(rows, cells, strict=True)
    ]


def _paid(planned: Planned, seconds: float) -> tuple[str, str, str]:
    return duration(seconds), f"{planned.node_hours(seconds):.2f}", money(planned.cost(seconds))


def _machine(m: Machines) -> str:
    gpus = f", {m.gpus:g} {m.accelerator or 'GPU'}" if m.gpus else ""
    return f"{m.name} ({m.cpus:g} CPU{gpus}{', spot' if m.spot else ''})"


def _memory(count: float | None) -> str:
    return "" if count is None else f"{count / 2**30:.1f} GiB"
