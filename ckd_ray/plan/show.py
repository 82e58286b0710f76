"""A plan as people read it: a line a stage, what bounds, what was assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckd_ray.progress import duration

if TYPE_CHECKING:
    from ckd_ray.plan.cluster import Machines
    from ckd_ray.plan.job import Planned


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
    lines = [
        f"collection: {sizes.passages:,} passages of {sizes.tokens:.0f} tokens ({sizes.kept:.0f} stored), "
        f"{sizes.queries.get('train', 0):,} training queries ({how})",
        f"cluster: {machines}; {money(cluster.usd)} an hour",
        f"rates: {planned.rates.machine}, {planned.rates.backbone}",
        f"ways: {layout.actors} encoders, search by {layout.retrieve.engine} ({layout.retrieve.count} servers), "
        f"votes by {layout.votes}, {layout.distill_workers} training workers",
        "",
    ]
    rows: list[tuple[str, ...]] = [("stage", "time", "cost", "storage", "driver", "actor", "GPU", "waits for")]
    for stage in plan.stages:
        bound = f"{stage.bound.waits}: {stage.bound.name}" if stage.bound else ""
        memory = [_memory(stage.memory.get(name)) for name in ("driver", "actor", "gpu")]
        stored = size(sum(stage.storage.values()))
        rows.append((stage.name, duration(stage.seconds), money(stage.cost(cluster.usd)), stored, *memory, bound))
    total = None if cluster.usd is None else cluster.usd * plan.seconds / 3600
    rows.append(("all", duration(plan.seconds), money(total), size(plan.storage), "", "", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)), row[-1]]
        lines.append("  ".join(cells).rstrip())
    longest = plan.bound
    share = longest.seconds / max(plan.seconds, 1e-9)
    part = longest.bound
    lines += [
        "",
        f"{longest.name} bounds: {share:.0%} of the time"
        + (f", and most of that is {part.name} (waits for: {part.waits})" if part else ""),
        f"{duration(plan.serial_seconds)} would not shrink with more machines",
    ]
    lines += [f"assumed: {text}" for text in planned.rates.assumptions]
    lines += [f"warning: {text}" for text in planned.warnings]
    return "\n".join(lines)


def _machine(m: Machines) -> str:
    gpus = f", {m.gpus:g} {m.accelerator or 'GPU'}" if m.gpus else ""
    return f"{m.name} ({m.cpus:g} CPU{gpus}{', spot' if m.spot else ''})"


def _memory(count: float | None) -> str:
    return "" if count is None else f"{count / 2**30:.1f} GiB"
