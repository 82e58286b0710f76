"""Parts: consecutive queries that one task processes and one file holds."""

from __future__ import annotations

from typing import Any

from ckd_ray.files import list_files

_QUERIES_A_PART = 256
# Ray Data keeps a few kilobytes per block and searches all blocks; with more units than this, units share a block.
MOST_BLOCKS = 2048


def query_spans(num_queries: int, size: int = _QUERIES_A_PART) -> list[tuple[int, int]]:
    """(first, stop) of every part, whatever the number of workers."""
    return [(first, min(first + size, num_queries)) for first in range(0, num_queries, size)]


def part_name(split: str, part: int) -> str:
    """The stem of the files of a part: rankings, labels and scores of the same queries have the same name."""
    return f"{split}-{part:06d}"


def part_file(split: str, part: int) -> str:
    """The Parquet file of a part."""
    return part_name(split, part) + ".parquet"


def parts_present(folder: str) -> set[str]:
    """The Parquet files of finished parts, in a folder where each part has an array as well (labels, scores)."""
    names = set(list_files(folder))
    return {n for n in names if n.endswith(".parquet") and n.removesuffix(".parquet") + ".npy" in names}


def run_parts(missing: list[int], spans: list[tuple[int, int]], work: Any, arguments: dict[str, Any]) -> Any:
    """The rows that `work` returns, one per part, as they are finished; nothing else reaches the driver."""
    if not missing:
        return iter(())
    items = [{"part": i, "first": spans[i][0], "stop": spans[i][1]} for i in missing]
    import ray  # not at the top: `inspect` reads parts, and has to start without Ray

    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS)).map_batches(
        work,
        fn_kwargs=arguments,
        batch_size=1,
        batch_format="numpy",
        num_cpus=0.25,
    )
    return dataset.iter_rows()
