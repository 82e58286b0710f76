"""README.md of exported labels: the head that the hub reads, the columns of each format, the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckd_ray.runs.data_card import data_card

_TABLES = {name: f"{name}.parquet" for name in ("train", "queries", "documents")}
_ROWS = {"train": "train.jsonl"}


def _tsv(name: str) -> dict[str, Any]:
    """Lines without a header, quotes or escapes; a text may be `NA` or begin with a quote."""
    return {
        "data_files": f"{name}.tsv", "sep": "\t", "names": ["id", "text"], "quoting": 3, "keep_default_na": False
    }  # fmt: skip


# Format -> what `load_dataset` reads there, and the columns in words.
_FILES: dict[str, tuple[Mapping[str, str | Mapping[str, Any]], str]] = {
    **dict.fromkeys(
        ("sentence-transformers", "pylate"),
        (
            _TABLES,
            "`train` has `query_id`, `document_ids` and `scores`; `queries` has `query_id` and `text`; `documents` has"
            " `document_id` and `text`.",
        ),
    ),
    "colbert": (
        {name: _tsv(name) for name in ("queries", "collection")},
        "A line of `train.jsonl` is `[qid, [pid, score], ...]`, which is no table: colbert-ai reads it. Its ids are the"
        " numbers in the lines of `queries.tsv` and `collection.tsv`.",
    ),
    "flagembedding": (_ROWS, "Columns: `query`, `pos`, `neg`, `pos_scores`, `neg_scores`."),
    "tevatron": (
        _ROWS,
        "Columns: `query_id`, `query_text`, `positive_document_ids`, `negative_document_ids`, and `query`,"
        " `positive_passages`, `negative_passages`, whose passages have `docid`, `text` and `score`.",
    ),
    "triples": (_ROWS, "Columns: `query`, `positive`, `negative` and `margin`, the difference of the two scores."),
}


def labels_card(
    config: Mapping[str, Any], fmt: str, width: int, scaling: str, counts: Mapping[str, int], *, positives: bool
) -> str:
    """The card as Markdown.

    Args:
        config: of the run; its sections `label` and `distill` are shown.
        counts: `queries`, `unlabelled` of them, and `left_out`.
        positives: the format has positives and negatives, so a query needs both.
    """
    scaled = "each query's scores are brought to 0 .. 1" if scaling == "minmax" else "scores are the teacher's own"
    settings = json.dumps(
        {key: config[key] for key in ("label", "distill") if key in config}, indent=2, ensure_ascii=False
    )
    unlabelled, no_negative = "", ", or labelled ones only," if positives else ""
    if counts["unlabelled"]:
        best = ", and the passage that it scores highest is their positive" if positives else ""
        unlabelled = f"\n{counts['unlabelled']:,} of the queries have no label: their order is the teacher's{best}."
    configs, columns = _FILES[fmt]
    name = next(iter(configs))
    text = f"""# Collective relevance labels

Written by ckd-ray in the form of {fmt}: {counts["queries"]:,} queries with {width} candidates each, the labelled
passages first and the others by falling score.{unlabelled}
{counts["left_out"]:,} queries have fewer candidates{no_negative} and are left out.
A score is the teacher's, with the expansion of its feedback passages and the ensemble; {scaled}. A labelled passage
keeps its own score: losses that want it highest have to raise it.

{columns}

```python
from datasets import load_dataset
{name} = load_dataset("FOLDER", "{name}", split="train")
```

## Settings

```json
{settings}
```
"""
    return data_card(configs, text, tags=("knowledge-distillation",))
