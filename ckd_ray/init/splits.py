"""Setting queries aside for dev and test, where the collection has none."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from ckd_ray.config.schema import Split
from ckd_ray.init.facts import Facts, Part, same_text

# Fewer queries tell systems apart only when one is far better.
LEAST = 50
_SHARE, _MOST = 0.1, 500


def set_aside(facts: Facts, seed: int) -> list[str]:
    """Take test and then dev from the training queries where there are none: a tenth, 50 at least and 500 at most, as
    long as half of the labelled queries stays in train. Returns what was done, for people.

    The order is a hash of seed and text, so that it depends neither on the order of the files nor on other queries, and
    queries of the same text stay together.
    """
    train, notes = facts.parts["train"], list[str]()
    labelled = {label.query for label in train.labels}
    total = len(labelled)
    for split in ("test", "dev"):
        if split in facts.parts:
            continue
        wanted = min(_MOST, max(LEAST, round(_SHARE * total)))
        if len(labelled) - wanted < total / 2:
            notes.append(
                f"no {split} split: of {total:,} labelled queries, {LEAST} for {split} would leave too few to train on;"
                " label more, or measure on the rest"
            )
            continue
        chosen = _chosen({name: train.queries[name] for name in labelled}, wanted, seed)
        facts.parts[split] = _taken(train, chosen)
        labelled -= chosen
        notes.append(f"{split}: {len(chosen):,} queries set aside from train, by seed {seed}")
    if len(labelled) < total:
        facts.parts["train"] = _taken(train, labelled)
        if unlabelled := len(train.queries) - total:
            notes.append(f"{unlabelled:,} queries without a label are left out")
    return notes


def _chosen(texts: dict[str, str], wanted: int, seed: int) -> set[str]:
    groups: dict[str, list[str]] = {}
    for name, text in texts.items():
        groups.setdefault(same_text(text), []).append(name)
    chosen: set[str] = set()
    for text in sorted(groups, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest()):
        if len(chosen) >= wanted:
            break
        chosen.update(groups[text])
    return chosen


def _taken(train: Part, names: set[str]) -> Part:
    queries = {name: text for name, text in train.queries.items() if name in names}
    labels = [label for label in train.labels if label.query in names]
    return replace(train, queries=queries, labels=labels, own_queries=False, own_labels=False)


def shared_texts(facts: Facts) -> dict[Split, list[str]]:
    """The queries of dev and test whose text is also that of a training query."""
    trained = {same_text(text) for text in facts.parts["train"].queries.values()}
    return {
        split: found
        for split, part in facts.parts.items()
        if split != "train" and (found := [text for text in part.queries.values() if same_text(text) in trained])
    }
