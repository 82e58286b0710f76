"""The table of a comparison: mean over seeds, interval, significance against contrastive, seconds, labelling cost.

Shapes: S seeds, N queries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ckd_ray.arrays import Float64Array
from ckd_ray.distill import objectives
from ckd_ray.evaluate.significance import bootstrap_interval, holm, paired_difference

BASELINE = objectives.BASELINE.name


@dataclass
class System:
    """The measurements of one row of the table.

    Attributes:
        values: split -> measure -> (S, N), queries in the same order for all systems.
        seconds: of training (mean over seeds); None for a system that is not trained.
        labelling: seconds of the stages that only this objective needs.
        settings: the keys of `distill` that the objective reads.
    """

    name: str
    seeds: list[int]
    values: dict[str, dict[str, Float64Array]]
    seconds: float | None = None
    labelling: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def build_table(systems: list[System], training_queries: int) -> dict[str, Any]:
    """An entry for each split, measure and system; `render_markdown` explains the columns."""
    baseline = next((s for s in systems if s.name == BASELINE), None)
    splits: dict[str, Any] = {}
    for split in systems[0].values if systems else {}:
        splits[split] = {}
        for measure in systems[0].values[split]:
            cells = {s.name: _cell(s, baseline, split, measure) for s in systems}
            tested = [cell for cell in cells.values() if "difference_p" in cell]
            for cell, p in zip(tested, holm([cell["difference_p"] for cell in tested]), strict=True):
                cell["difference_p_holm"] = p
            splits[split][measure] = cells
    return {
        "splits": splits,
        "queries": {split: next(iter(v.values())).shape[1] for split, v in systems[0].values.items() if v},
        "systems": {
            s.name: {
                "seeds": s.seeds,
                "train_seconds": s.seconds,
                "label_seconds": s.labelling,
                "label_seconds_a_query": None if s.labelling is None else s.labelling / max(1, training_queries),
                "settings": s.settings,
            }
            for s in systems
        },
        "baseline": BASELINE,
        "training_queries": training_queries,
    }


def _cell(system: System, baseline: System | None, split: str, measure: str) -> dict[str, Any]:
    values_SN = system.values[split][measure]
    by_seed = values_SN.mean(1) if values_SN.shape[1] else np.zeros(len(values_SN))
    low, high = bootstrap_interval(values_SN)
    cell: dict[str, Any] = {
        "mean": float(by_seed.mean()),
        "low": low,
        "high": high,
        "seeds": [float(v) for v in by_seed],
        "standard_deviation": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
    }
    if baseline is not None and system.name != BASELINE:
        base_SN = baseline.values[split][measure]
        if len(base_SN) != len(values_SN):  # baselines and teacher have a single row
            base_SN, values_SN = base_SN.mean(0, keepdims=True), values_SN.mean(0, keepdims=True)
        cell |= {f"difference_{k}": v for k, v in asdict(paired_difference(base_SN, values_SN)).items()}
    return cell


def render_markdown(table: dict[str, Any]) -> str:
    """`table.md`: a table for each split, and a legend."""
    lines = [f"# Comparison of {len(table['systems'])} systems", ""]
    for split, measures in table["splits"].items():
        names = list(measures)
        lines += [f"## {split} ({table['queries'][split]:,} queries)", ""]
        lines.append("| system | " + " | ".join(names) + " | training, s | labelling, ms a query |")
        lines.append("|---" * (len(names) + 3) + "|")
        for name, facts in table["systems"].items():
            cells = [_text(measures[measure][name]) for measure in names]
            seconds = "" if facts["train_seconds"] is None else f"{facts['train_seconds']:,.0f}"
            cost = "" if facts["label_seconds_a_query"] is None else f"{1000 * facts['label_seconds_a_query']:,.2f}"
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds} | {cost} |")
        lines.append("")
    lines += [
        "Each cell has the mean over seeds and queries, and in brackets the 95 % bootstrap interval (over queries and "
        f"seeds). Then follow the difference from `{table['baseline']}`, which has the same hard negatives, p of the "
        "paired randomisation test over queries on the means of the seeds, and this p Holm-corrected over the "
        "comparisons of one measure and split (* below 0.05). `encoder`: the backbone as it is, one pooled vector a "
        "text; `bm25`: BM25. Labelling: the time of the stages that only this objective needs, for each of the "
        f"{table['training_queries']:,} training queries; an interrupted stage counts its last call only.",
        "",
    ]
    return "\n".join(lines)


def _text(cell: dict[str, Any]) -> str:
    text = f"{cell['mean']:.4f} [{cell['low']:.4f}, {cell['high']:.4f}]"
    if "difference_p" in cell:
        star = " *" if cell["difference_p_holm"] < 0.05 else ""
        text += f" {cell['difference_mean']:+.4f}, p {cell['difference_p']:.4f}"
        text += f", Holm {cell['difference_p_holm']:.4f}{star}"
    return text


def render_text(table: dict[str, Any]) -> str:
    """For the terminal: a block for each split and measure."""
    lines = []
    width = max(len(name) for name in table["systems"])
    for split, measures in table["splits"].items():
        lines.append(f"{split} ({table['queries'][split]:,} queries)")
        for measure, cells in measures.items():
            lines.append(
                f"  {measure:<{width}}{'mean':>8}   {'95 % interval':<18}{'- contrastive':>14}{'p':>8}{'Holm':>8}"
                f"  {'training':>9}"
            )
            for name, cell in cells.items():
                seconds = table["systems"][name]["train_seconds"]
                difference = f"{cell['difference_mean']:+.4f}" if "difference_mean" in cell else ""
                p, corrected = (f"{cell[k]:.4f}" if k in cell else "" for k in ("difference_p", "difference_p_holm"))
                lines.append(
                    f"  {name:<{width}}{cell['mean']:>8.4f}   [{cell['low']:.4f}, {cell['high']:.4f}]{difference:>14}"
                    f"{p:>8}{corrected:>8}  {'' if seconds is None else f'{seconds:,.0f} s':>9}".rstrip()
                )
    return "\n".join(lines)
