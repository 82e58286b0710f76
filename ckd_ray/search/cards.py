"""README.md of exported vectors and indexes: what lies there, and how it is loaded."""

from __future__ import annotations

from typing import Any

from ckd_ray import __version__
from ckd_ray.runs.data_card import data_card

_SIMILARITIES = {
    "cosine": "",
    "l2": " It was trained with minus squared distances, which rank unit rows alike.",
}


def vectors_card(run: str, about: dict[str, Any]) -> str:
    """Of `vectors-parquet`.

    Args:
        run: the run's name.
        about: `passages`, `tokens`, `dim`, `model` and `similarity`, as the manifest has them.
    """
    return data_card(
        {"vectors": "data/*.parquet"},
        f"""# Token embeddings of passages

{_origin(run, about)}

A row a passage, in the order of the collection:

| column | type | what |
|---|---|---|
| `id` | string | the passage's id |
| `text` | string | the passage, title included |
| `vectors` | list of lists of {about["dim"]} float16 | a unit row a token; empty if a passage could not be embedded |

{_score(about)}

```python
from datasets import load_dataset
passages = load_dataset("FOLDER", "vectors", split="train")

import pyarrow.dataset
passages = pyarrow.dataset.dataset("FOLDER/data")  # the folder itself also holds this card
```
""",
        tags=("multi-vector",),
    )


def index_card(run: str, about: dict[str, Any]) -> str:
    """Of `index-fast-plaid`; `about` has `bits` and `centroids` besides."""
    return data_card(
        {"passage_ids": "passage_ids.parquet"},
        f"""# An index for fast-plaid

{_origin(run, about)}
Residual codes of {about["bits"]} bits a dimension, {about["centroids"]:,} centroids; read by fast-plaid 1.4 to 1.7.

fast-plaid names a passage by a number. Row n of `passage_ids.parquet` has the id of passage n.

```python
import pyarrow.parquet as pq, torch
from fast_plaid import search
ids = pq.read_table("FOLDER/passage_ids.parquet")["id"]
index = search.FastPlaid(index="FOLDER", device="cpu")
found = index.search([torch.from_numpy(rows) for rows in queries], top_k=10)
hits = [(ids[number].as_py(), score) for number, score in found[0]]
```

`queries` are float32 arrays of shape (rows, {about["dim"]}), the rows of a query's text, made by the same model.
From the hub, bring the folder here first:
`huggingface_hub.snapshot_download(NAME, repo_type="dataset", local_dir="FOLDER")`.
fast-plaid merges the parts into files of its own when it first opens an index.

{_score(about)}
""",
        tags=("fast-plaid",),
    )


def _origin(run: str, about: dict[str, Any]) -> str:
    return (
        f"Written by ckd-ray {__version__}: {about['passages']:,} passages with {about['tokens']:,} token embeddings of"
        f" {about['dim']} dimensions, by the {about['model']} of the run {run}."
    )


def _score(about: dict[str, Any]) -> str:
    return (
        "The score is MaxSim: the sum, over the rows of a query, of the greatest inner product with a row of the"
        f" passage.{_SIMILARITIES.get(about['similarity'], '')}"
    )
