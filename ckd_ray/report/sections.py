"""The sections of the page, each a string of HTML made of `Facts`; empty when there is nothing to show.

Every text from outside (ids, passages, queries, settings) goes through `escape`.
"""

from __future__ import annotations

from html import escape
from typing import Any

import yaml

from ckd_ray.distill.objectives import BASELINE, OBJECTIVES
from ckd_ray.distill.targets import degenerate, targets_of
from ckd_ray.labels.inspect import by_depth
from ckd_ray.progress import duration
from ckd_ray.report.closing import differences, systems, worth
from ckd_ray.report.facts import Facts, SplitWins
from ckd_ray.report.plots import Interval, Series, bar, histogram, intervals, lines, number
from ckd_ray.report.wins import Example

_GOOD = '<span class="tag good">labelled</span>'
_NOT_MEASURES = {"step", "loss", "learning_rate", "gradient_norm", "seconds"}


def header(facts: Facts) -> str:
    """Name, what it is, whether it is worth having, the measures of the last split as cards, and all systems."""
    config = facts.run.record.get("config", {})
    distill = config.get("distill", {})
    rows = facts.collection.get("rows")
    about = [
        f"objective {distill.get('objective', '?')}",
        f"{rows:,} passages" if isinstance(rows, int) else "",
        f"ckd-ray {facts.run.record.get('ckd_ray', '')}",
    ]
    text = f"<h1>{escape(facts.run.name)}</h1><p class=soft>{escape(' · '.join(a for a in about if a))}</p>"
    return text + worth(facts) + _verdict(facts) + _cards(facts) + systems(facts)


def _last_split(facts: Facts) -> str | None:
    return list(facts.comparison)[-1] if facts.comparison else None


def _verdict(facts: Facts) -> str:
    split = _last_split(facts)
    if split is None or not facts.comparison[split]:
        return "<p>This run has not been evaluated with teacher and student yet.</p>"
    measure, row = next(iter(facts.comparison[split].items()))
    difference = row["difference_mean"]
    if row["difference_p"] >= 0.05:
        verdict = "does not differ from its teacher by more than chance would explain"
    else:
        verdict = f"ranks {'better' if difference > 0 else 'worse'} than its teacher"
    return (
        f"<p>On {escape(split)} ({row['queries']:,} queries) the student {verdict}: {escape(measure)} "
        f"{row['student']:.4f} against {row['teacher']:.4f}, {difference:+.4f} "
        f"[{row['difference_low']:+.4f}, {row['difference_high']:+.4f}], p = {row['difference_p']:.4f}.</p>"
    )


def _cards(facts: Facts) -> str:
    split = _last_split(facts)
    if split is None:
        return ""
    cards = []
    for measure, row in facts.comparison[split].items():
        difference = row["difference_mean"]
        kind = "up" if difference > 0 else "down" if difference < 0 else "soft"
        cards.append(
            f"<div class=card><span>{escape(measure)}, {escape(split)}</span><b>{row['student']:.4f}</b>"
            f"<span class={kind}>{difference:+.4f} from the teacher</span></div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"


def table(facts: Facts) -> str:
    """The student against every other system, split by split."""
    found = differences(facts)
    if not found:
        return _means(facts)
    note = (
        "<p class=note>p: paired randomisation test over queries; corrected: by Holm, over the comparisons of one "
        "measure and split; interval: bootstrap over queries. A query without results counts as 0.</p>"
    )
    return found + note + _against(facts)


def _means(facts: Facts) -> str:
    """A variant has no other systems of its own: the student's means."""
    if not facts.measures:
        return ""
    rows = [
        f"<tr><td class=l>{escape(split)}</td><td class=l>{escape(system)}</td><td class=l>{escape(name)}</td>"
        f"<td>{value:.4f}</td></tr>"
        for split, systems in facts.measures["splits"].items()
        for system, means in systems.items()
        for name, value in means.items()
    ]
    head = "<tr><th class=l>split<th class=l>system<th class=l>measure<th>mean</tr>"
    return f"<div class=scroll><table class=sortable><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


def _against(facts: Facts) -> str:
    parts = []
    for found in facts.against:
        here, there = found["here"], found["there"]
        rows = "".join(
            f"<tr><td class=l>{escape(split)}</td><td class=l>{escape(name)}</td><td>{r['there']:.4f}</td>"
            f"<td>{r['here']:.4f}</td><td>{r['difference_mean']:+.4f}</td>"
            f"<td>[{r['difference_low']:+.4f}, {r['difference_high']:+.4f}]</td><td>{r['difference_p']:.4f}</td></tr>"
            for split, table_ in found["splits"].items()
            for name, r in table_.items()
        )
        notes = "".join(f"<p class=note>{escape(note)}</p>" for note in found["notes"])
        parts.append(
            f"<h3>{escape(here['system'])} against the {escape(there['system'])} of another run</h3>"
            f"<p class=id>{escape(there['run'])}</p>{notes}<div class=scroll><table class=sortable><thead><tr>"
            "<th class=l>split<th class=l>measure<th>there<th>here<th>difference<th>95 % interval<th>p</tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
        )
    return "".join(parts)


def comparison(facts: Facts) -> str:
    """The objectives, seeds and baselines of `ckd-ray compare`."""
    if not facts.table:
        return ""
    found, parts = facts.table, []
    for split, measures in found["splits"].items():
        names = list(measures)
        first = names[0]
        rows = []
        for name, facts_of in found["systems"].items():
            cells = "".join(
                f'<td data-v={measures[m][name]["mean"]:.6f} title="{escape(_cell_hint(measures[m][name]))}">'
                f"{measures[m][name]['mean']:.4f}</td>"
                for m in names
            )
            difference = measures[first][name]
            test = (
                f"<td>{difference['difference_mean']:+.4f}</td><td>{difference['difference_p']:.4f}</td>"
                f"<td>{_corrected(difference)}</td>"
                if "difference_p" in difference
                else "<td></td><td></td><td></td>"
            )
            seconds, cost = facts_of["train_seconds"], facts_of["label_seconds_a_query"]
            cells += test
            cells += f"<td data-v={seconds or 0:.2f}>{'' if seconds is None else escape(duration(seconds))}</td>"
            cells += f"<td>{'' if cost is None else f'{1000 * cost:,.2f}'}</td>"
            rows.append(f"<tr><td class=l>{escape(name)}</td>{cells}</tr>")
        heads = "".join(f"<th>{escape(m)}" for m in names)
        drawn = intervals(
            [Interval(n, c["mean"], c["low"], c["high"], c["seeds"]) for n, c in measures[first].items()],
            caption=f"{first}, {split}: mean, 95 % interval, and each seed",
        )
        parts.append(
            f"<h3>{escape(split)} ({found['queries'][split]:,} queries)</h3><div class=scroll><table class=sortable>"
            f"<thead><tr><th class=l>system{heads}<th>{escape(first)} - {escape(found['baseline'])}<th>p<th>corrected p"
            f"<th>training<th>labels, ms a query</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{drawn}"
        )
    budget = ", ".join(f"{key} {value:,}" for key, value in found.get("budget", {}).items())
    return (
        f"<p>One student for each objective and seed, all under one budget ({escape(budget)}), sharing teacher, "
        "embeddings, rankings and labels.</p>"
        + "".join(parts)
        + "<p class=note>Interval: bootstrap over queries and seeds. "
        f"p: paired randomisation test against {escape(found['baseline'])} over queries, on the means of the seeds; "
        "corrected: by Holm, over the comparisons of one measure and split.</p>"
    )


def _corrected(cell: dict[str, Any]) -> str:
    """Tables of earlier versions have no corrected p."""
    return f"{cell['difference_p_holm']:.4f}" if "difference_p_holm" in cell else ""


def _cell_hint(cell: dict[str, Any]) -> str:
    text = f"[{cell['low']:.4f}, {cell['high']:.4f}]"
    if len(cell["seeds"]) > 1:
        text += "; seeds " + ", ".join(f"{v:.4f}" for v in cell["seeds"])
    return text


def curves(facts: Facts) -> str:
    """Loss of teacher and student, their measures on dev where training took any, and learning rates."""
    parts = []
    for name, records in facts.curves.items():
        if not records:
            continue
        steps = [float(r["step"]) for r in records if "step" in r]
        loss = [(float(r["step"]), float(r["loss"])) for r in records if "loss" in r]
        shown = [Series("loss", loss)]
        window = max(1, len(loss) // 20)
        if window > 1:
            smooth = [
                (loss[i][0], sum(v for _, v in loss[max(0, i - window + 1) : i + 1]) / min(i + 1, window))
                for i in range(len(loss))
            ]
            shown.append(Series(f"mean of {window} records", smooth))
        parts.append(lines(shown, x="step", y=f"Loss of the {name}"))
        parts.append(_targets(facts, name, records))
        keys = dict.fromkeys(k for r in records for k, v in r.items() if _is_measure(k, v))
        dev = [Series(k, [(float(r["step"]), float(r[k])) for r in records if _is_measure(k, r.get(k))]) for k in keys]
        parts.append(lines(dev, x="step", y=f"Dev, {name}", from_zero=False) if steps and dev else "")
    return f"<div class=two>{''.join(parts)}</div>" if any(parts) else ""


def _targets(facts: Facts, name: str, records: list[dict[str, Any]]) -> str:
    """What a student's loss compared it with: the entropy of the targets and the label's probability in them."""
    figures = targets_of(records)
    if name != "student" or not figures:
        return ""
    kinds = {"target_entropy_share": "entropy, share of the highest", "label_mass": "probability of the label"}
    shown = [
        Series(text, [(float(r["step"]), float(r[key])) for r in records if key in r]) for key, text in kinds.items()
    ]
    distill = facts.run.record.get("config", {}).get("distill", {})
    reads_teacher = OBJECTIVES.get(distill.get("objective", ""), BASELINE).has_teacher
    notice = degenerate(figures, distill.get("temperature", "auto")) if reads_teacher else None
    text = f"The targets have an entropy of {figures['target_entropy']:.3f} nats on average, "
    text += f"{figures['target_entropy_share']:.1%} of the highest possible."
    warned = f"<p class=down>{escape(notice)}</p>" if notice else ""
    return f"<div>{lines(shown, x='step', y='Targets of the student')}<p class=note>{text}</p>{warned}</div>"


def _is_measure(key: str, value: Any) -> bool:
    """A number that a measurement on dev has put beside the losses (`mrr@10`)."""
    return key not in _NOT_MEASURES and "@" in key and isinstance(value, int | float)


def wins(facts: Facts) -> str:
    """Per-query differences: how many, and the extreme ones with what both systems put on top."""
    return "".join(_wins_of(found) for found in facts.wins)


def _wins_of(found: SplitWins) -> str:
    better, worse = sum(g > 0 for g in found.gains), sum(g < 0 for g in found.gains)
    same = len(found.gains) - better - worse
    group = f"wins-{found.split}"
    items = "".join(
        _example(example, group, kind) for kind, one in (("won", found.won), ("lost", found.lost)) for example in one
    )
    return (
        f"<h3>{escape(found.split)}, {escape(found.measure)}</h3>"
        f"<p>The student is <span class=up>better on {better:,}</span>, <span class=down>worse on {worse:,}</span> and "
        f"equal on {same:,} of {len(found.gains):,} queries.</p>"
        + histogram(
            found.gains,
            caption=f"Student minus teacher, queries by difference of {found.measure}",
            x=found.measure,
        )
        + f'<div data-choose="{escape(group)}" hidden><span class=tabs><button type=button value=won>won</button>'
        "<button type=button value=lost>lost</button></span><input class=filter type=search "
        f'placeholder="Filter by words of the query or its passages" aria-label="Filter {escape(found.split)} queries">'
        f'</div>{items}<p class=note data-empty="{escape(group)}" hidden>No such query among those shown.</p>'
        f"<p class=note>The {len(found.won)} largest gains and {len(found.lost)} largest losses are listed.</p>"
    )


def _example(example: Example, group: str, kind: str) -> str:
    direction = "up" if example.gain > 0 else "down"
    labelled = "".join(
        f"<li><span class='tag good'>labelled{f', grade {int(grade)}' if grade != 1 else ''}</span>"
        f"<span class=tag>rank {_rank(before)} → {_rank(after)}</span> <span class=id>{escape(passage)}</span><br>"
        f"{escape(text) or '<i>empty passage</i>'}</li>"
        for passage, text, grade, before, after in example.labelled
    )
    tops = "".join(
        f"<h3>top of the {escape(system)}</h3><ol class=hits>"
        + "".join(
            f"<li><span class=tag>{rank}</span>{_GOOD if positive else ''}"
            f"<span class=id>{escape(passage)}</span><br>{escape(text)}</li>"
            for rank, passage, text, positive in top
        )
        + "</ol>"
        for system, top in example.tops.items()
    )
    return (
        f'<details data-group="{escape(group)}" data-kind="{kind}"><summary><span class=q>{escape(example.text)} '
        f"<span class=id>{escape(example.query_id)}</span></span><span class='d {direction}'>{example.gain:+.3f}</span>"
        f"</summary><div class=body><p class=note>teacher {number(example.teacher)}, student "
        f"{number(example.student)}</p>"
        f"<ol class=hits>{labelled}</ol><div class=two>{tops}</div></div></details>"
    )


def _rank(rank: int | None) -> str:
    return "none" if rank is None else str(rank)


def labels(facts: Facts) -> str:
    """Some training queries: feedback, expansion, and the three distributions side by side."""
    items = []
    for found in facts.labels:
        tokens = "".join(_tokens(depth, centroids) for depth, centroids in by_depth(found))
        rows = "".join(
            f"<tr><td>{escape(str(p['rank'] or ''))}</td><td class='l wrap'>"
            f"{_GOOD if p['labelled'] else ''}{escape(p['text'])} "
            f"<span class=id>{escape(p['passage_id'])}</span></td>"
            + "".join(
                f"<td data-v={p[key]:.6f}>{bar(p[key], colour)} {p[key]:.3f}</td>"
                for key, colour in (("one_hot", "c2"), ("teacher", "c1"), ("collective", ""))
            )
            + "</tr>"
            for p in found["passages"]
        )
        feedback = ", ".join(escape(p["passage_id"]) for p in found["feedback"])
        items.append(
            f"<details><summary><span class=q>{escape(found['text'])} <span class=id>{escape(found['query_id'])}</span>"
            f"</span></summary><div class=body><p class=note>feedback passages: <span class=id>{feedback}</span></p>"
            f"{tokens}<div class=scroll><table class=sortable><thead><tr><th>rank<th class=l>"
            f"passage<th>one-hot<th>teacher<th>collective</tr></thead><tbody>{rows}</tbody></table></div></div></details>"
        )
    if not items:
        return ""
    settings = facts.labels[0]["settings"]
    return (
        "<p>Training queries as <code>ckd-ray inspect</code> shows them: the tokens that the feedback passages add "
        "(with their idf; pale ones do not count), and what one-hot, teacher and collective labels make of the same "
        "passages.</p>"
        + "".join(items)
        + f"<p class=note>Softmax over the passages shown, temperature {settings['temperature']}, beta "
        f"{settings['beta']}, {settings['expansion_size']:d} expansion embeddings.</p>"
    )


def _tokens(depth: int | None, centroids: list[dict[str, Any]]) -> str:
    """The tokens of an expansion; `depth`: of the feedback, when there are several."""
    tokens = "".join(
        f"<span class='token{'' if e['weight'] else ' out'}'>{escape(str(e['token']))}<i>{e['idf']:.2f}</i></span>"
        for e in centroids
    )
    head = "" if depth is None else f"<p class=note>from the top {depth} of the feedback</p>"
    return f"{head}<div class=tokens>{tokens}</div>"


def stages(facts: Facts) -> str:
    """Seconds and rate of every stage."""
    if not facts.stages:
        return ""
    longest = max(s["seconds"] for s in facts.stages) or 1.0
    total = sum(s["seconds"] for s in facts.stages)
    rows = []
    for s in facts.stages:
        count, unit = s["figures"].get("count"), s["figures"].get("unit", "")
        rate = f"{number(count / s['seconds'])} {escape(unit)}/s" if count and s["seconds"] else ""
        what = f"{count:,} {escape(unit)}" if count is not None else ""
        rows.append(
            f"<tr><td class=l>{escape(s['name'])}</td><td class=l>{bar(s['seconds'] / longest)}</td>"
            f"<td data-v={s['seconds']:.3f}>{escape(duration(s['seconds']))}</td><td data-v={count or 0}>{what}</td>"
            f"<td>{rate}</td></tr>"
        )
    return (
        "<div class=scroll><table class=sortable><thead><tr><th class=l>stage<th class=l>share<th>time<th>amount"
        f"<th>rate</tr></thead><tbody>{''.join(rows)}</tbody></table></div><p class=note>"
        f"{escape(duration(total))} in all. A stage that was interrupted counts the call that finished it.</p>"
        + _set_aside(facts)
    )


def _set_aside(facts: Facts) -> str:
    """Passages on which the encoder fails every time; their number is that of the whole corpus, the names a few."""
    names = [name for stage in facts.stages for name in stage["figures"].get("set_aside", [])]
    if not names:
        return ""
    shown = ", ".join(f"<span class=id>{escape(str(name))}</span>" for name in names[:20])
    return f"<p class=note>{len(names)} passages could not be encoded and were set aside: {shown}.</p>"


def environment(facts: Facts) -> str:
    """Versions, machine and the whole configuration."""
    record = facts.run.record
    machine = ", ".join(f"{key} {value}" for key, value in record.get("machine", {}).items())
    pairs = [("ckd-ray", record.get("ckd_ray")), ("python", record.get("python")), *record.get("versions", {}).items()]
    rows = "".join(f"<tr><td class=l>{escape(str(k))}</td><td class=l>{escape(str(v))}</td></tr>" for k, v in pairs)
    config = yaml.safe_dump(record.get("config", {}), sort_keys=False, allow_unicode=True, width=100)
    return (
        (f"<p class=note>{escape(machine)}</p>" if machine else "")
        + f"<details><summary><span class=q>versions</span></summary><div class='body scroll'><table><tbody>{rows}"
        f"</tbody></table></div></details><details><summary><span class=q>configuration</span></summary>"
        f"<div class=body><pre>{escape(config)}</pre></div></details>"
    )
