"""`ckd-ray inspect RUN QUERY_ID`: why a query has its labels. Needs no Ray.

Shapes: N passages.
"""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np

from ckd_ray.arrays import Int64Array
from ckd_ray.errors import UserError
from ckd_ray.files import join, read_parquet
from ckd_ray.inspection.labelled_run import SPLIT, LabelledRun
from ckd_ray.ray_util.parts import part_file
from ckd_ray.runs.finished import reading

# Ids that are compared with one that is not there.
_COMPARED = 2000


def inspect_query(run: str, query_id: str, top: int = 10) -> dict[str, Any]:
    """The facts that `inspect` shows of a training query; `render` makes them text.

    Args:
        run: a run, or a variant of one, by what `open_finished` accepts.
        top: passages of the ranking to compare, besides the labelled ones.

    Raises:
        UserError: no run, no labels, or no such query (names the nearest ids).
    """
    with reading(run):
        opened = LabelledRun.open(run)
        return inspect_at(opened, find_query(opened, query_id), top, words=14)


def inspect_at(opened: LabelledRun, query: int, top: int, words: int | None) -> dict[str, Any]:
    """`inspect_query` for the training query at a dense index, in a run that is open.

    Args:
        words: the length at which texts of passages are cut; None keeps them whole.
    """
    ranking = opened.rankings[query].astype(np.int64)
    ranking = ranking[ranking >= 0]
    labelled = opened.positives.of(query)
    label = _label_row(opened, query)
    feedback = ranking[: len(label["feedback_ids"])]
    labelled_ids = set(opened.collection.passage_ids(labelled))
    settings, depths = opened.settings, opened.expansions.depths
    names = (
        "temperature", "beta", "expansion_share", "expansion_size", "encoder_share", "bm25_share", "zero_row_floor",
    )  # fmt: skip

    def shown(indices: Int64Array) -> list[dict[str, Any]]:
        ids, texts = opened.collection.passage_ids(indices), opened.collection.texts(indices)
        cut = [text if words is None else _first_words(text, words) for text in texts]
        return [{"passage_id": i, "text": text} for i, text in zip(ids, cut, strict=True)]

    def compared() -> list[dict[str, Any]]:
        """One entry a passage, in the order of the ranking; labelled passages that were not retrieved come last."""
        passages_N = opened.with_labelled(query, ranking[:top])
        if not len(passages_N):
            return []
        columns = vars(opened.distributions(query, passages_N))
        rank_of = {p: rank for rank, p in enumerate(ranking.tolist(), 1)}
        entries = [
            {
                **passage,
                "rank": rank_of.get(index),
                "labelled": index in labelled.tolist(),
                **{name: float(column[i]) for name, column in columns.items()},
            }
            for i, (index, passage) in enumerate(zip(passages_N.tolist(), shown(passages_N), strict=True))
        ]
        return sorted(entries, key=lambda e: e["rank"] or len(ranking) + 1)

    return {
        "run": opened.paths.folder,
        "query_id": opened.queries.ids[query],
        "split": SPLIT,
        "text": opened.queries.texts[query],
        "labelled": shown(labelled),
        "feedback": [{**p, "labelled": p["passage_id"] in labelled_ids} for p in shown(feedback)],
        "expansion": _expansion(opened, query, label),
        "settings": {
            **{name: getattr(settings, name) for name in names},
            **({"feedback_passages": list(depths)} if depths else {}),
        },
        "passages": compared(),
    }


def find_query(opened: LabelledRun, query_id: str) -> int:
    """The dense index of a training query.

    Raises:
        UserError: there is none with this id; names the nearest ids.
    """
    ids = opened.queries.ids
    if query_id in ids:
        return ids.index(query_id)
    for split in opened.collection.splits:
        if split != SPLIT and query_id in opened.collection.queries(split).ids:
            raise UserError(
                f"query {query_id!r} is one of split {split}; labels are made for training queries",
                where="QUERY_ID",
                fix=f"choose one of split {SPLIT}, such as {ids[0]}",
            )
    near = nearest_ids(query_id, ids)
    raise UserError(
        "no such query",
        where="QUERY_ID",
        expected=f"the id of a training query; nearest: {', '.join(near)}",
        found=query_id,
    )


def nearest_ids(wanted: str, ids: list[str]) -> list[str]:
    """The three ids most similar to `wanted`, among the 2,000 that share the longest prefix with it: half a million
    comparisons would take seconds."""
    if len(ids) > _COMPARED:

        def common(other: str) -> int:
            return next((i for i, (a, b) in enumerate(zip(wanted, other, strict=False)) if a != b), len(other))

        ids = sorted(ids, key=common, reverse=True)[:_COMPARED]
    return difflib.get_close_matches(wanted, ids, 3, 0.0)


def _label_row(opened: LabelledRun, query: int) -> dict[str, Any]:
    """The query's row of `labels/*.parquet`, without the vectors."""
    part, row = divmod(query, opened.expansions.queries_per_part)
    columns = ["feedback_ids", "idf", "token_ids", *(["depths"] if opened.expansions.depths else [])]
    table = read_parquet(join(opened.paths.labels, part_file(SPLIT, part)), columns)
    found: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
    return found


def _first_words(text: str, count: int) -> str:
    words = text.split()
    return " ".join(words[:count]) + (" ..." if len(words) > count else "")


def _expansion(opened: LabelledRun, query: int, label: dict[str, Any]) -> list[dict[str, Any]]:
    """All kept centroids, heaviest first; `weight` is 0 beyond `distill.expansion_size`. Several depths follow one
    another, and each entry names its `depth`."""
    depths = label.get("depths", [])
    weights = opened.centroid_weights(query, label["idf"], depths)
    found: list[dict[str, Any]] = [
        {"token": opened.vocabulary.get(token, f"[{token}]"), "token_id": token, "idf": idf, "weight": weight}
        for token, idf, weight in zip(label["token_ids"], label["idf"], weights, strict=True)
    ]
    return [{**entry, "depth": depth} for entry, depth in zip(found, depths, strict=True)] if depths else found


def by_depth(found: dict[str, Any]) -> list[tuple[int | None, list[dict[str, Any]]]]:
    """(depth, centroids) of what `inspect_query` returns; the depth is None when the labels have one only."""
    depths = found["settings"].get("feedback_passages")
    if depths is None:
        return [(None, found["expansion"])]
    return [(depth, [e for e in found["expansion"] if e["depth"] == depth]) for depth in depths]


def render(found: dict[str, Any]) -> str:
    """What `inspect_query` returns, as text."""
    lines = [f"query {found['query_id']} ({found['split']}): {found['text']}", "", "labelled"]
    lines += [f"  {p['passage_id']}  {p['text']}" for p in found["labelled"]] or ["  nothing: it is not trained on"]
    lines += ["", "feedback (the top of the teacher's ranking; * is labelled)"]
    for p in found["feedback"]:
        lines.append(f"  {p['passage_id']}{' *' if p['labelled'] else ''}  {p['text']}")
    if not found["feedback"]:
        lines.append("  nothing was retrieved")
    s = found["settings"]
    blocks = by_depth(found)
    counting = sum(len(centroids[: s["expansion_size"]]) for _, centroids in blocks)
    lines += ["", f"expansion ({counting} of {len(found['expansion'])} centroids count; {_strength(s)})"]
    lines += [f"  {'token':<20}{'idf':>8}{'weight':>9}"]
    for depth, centroids in blocks:
        lines += [] if depth is None else [f"  from the top {depth} of the feedback"]
        lines += _centroids(centroids, s["expansion_size"])
    lines += _probabilities(found)
    return "\n".join(lines)


def _centroids(found: list[dict[str, Any]], size: int) -> list[str]:
    lines = [f"  {e['token']:<20}{e['idf']:>8.3f}{e['weight']:>9.4f}" for e in found[:size]]
    rest = ", ".join(f"{e['token']} {e['idf']:.2f}" for e in found[size:])
    return [*lines, f"  not counted: {rest}"] if rest else lines


def _strength(settings: dict[str, Any]) -> str:
    if settings["beta"] == "auto":
        return f"together they hold {settings['expansion_share']:.0%} of the teacher's weight"
    depths = len(settings.get("feedback_passages", ()))
    return f"weight = beta x idf / {depths}, the number of depths" if depths else "weight = beta x idf"


def _probabilities(found: dict[str, Any]) -> list[str]:
    s, rows = found["settings"], found["passages"]
    head = (
        f"probabilities: a softmax over these {len(rows)} passages alone, at temperature {s['temperature']}; "
        f"collective with beta {s['beta']}, expansion_size {s['expansion_size']}"
        f"{', zero_row_floor' if s['zero_row_floor'] else ''}"
    )
    note = "as in training, the labelled passage (*) is raised to the highest score"
    lines = ["", head, note, f"  {'rank':>5}{'one-hot':>10}{'teacher':>10}{'collective':>12}  passage"]
    for row in rows:
        rank = f"{row['rank']}" if row["rank"] else "-"
        lines.append(
            f"  {rank:>5}{row['one_hot']:>10.4f}{row['teacher']:>10.4f}{row['collective']:>12.4f}  "
            f"{row['passage_id']}{' *' if row['labelled'] else ''}  {row['text']}"
        )
    return lines
