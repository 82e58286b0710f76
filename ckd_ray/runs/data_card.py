"""README.md of an export that is a data set: a head in YAML, which hubs and the library `datasets` read, then text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

_TAGS = ["ColBERT", "late-interaction", "passage-retrieval", "ckd-ray"]


def data_card(configs: Mapping[str, str | Mapping[str, Any]], text: str, *, tags: tuple[str, ...] = ()) -> str:
    """The card as Markdown. The licence is left to its owner.

    Args:
        configs: name -> its file or files, as a pattern below the folder: what `load_dataset(folder, name)` reads; or a
            mapping of `data_files` and the options of their reader. The first is the one without a name. Files that
            are in none are passed over.
        text: Markdown.
        tags: further words for the search of the hub.
    """
    entries: list[dict[str, Any]] = [
        {"config_name": name, **({"data_files": one} if isinstance(one, str) else one)} for name, one in configs.items()
    ]
    if len(entries) > 1:
        entries[0]["default"] = True
    head = {"task_categories": ["text-retrieval"], "tags": [*_TAGS, *tags], "configs": entries}
    return f"---\n# license: choose one\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{text}"
