"""Parts: the consecutive queries that one task works on, and one file holds."""

from __future__ import annotations

from typing import Any

from ckd_ray.files import list_files

_QUERIES_A_PART = 256


# Ray Data keeps a few kilobytes a block and looks through all of them; beyond this many, parts share a block.
_MOST_BLOCKS = 2048


def query_spans(num_queries: int, size: int = _QUERIES_A_PART) -> list[tuple[int, int]]:
    """(first, stop) of every part; the same for any number of workers."""
    return [(first, min(first + size, num_queries)) for first in range(0, num_queries, size)]


def part_name(split: str, part: int) -> str:
    """The stem of a part's files: rankings, labels and scores of the same consecutive queries are named alike."""
    return f"{split}-{part:06d}"


def part_file(split: str, part: int) -> str:
    """The Parquet file of a part."""
    return part_name(split, part) + ".parquet"


def parts_present(folder: str) -> set[str]:
    """Parquet files of the finished parts in a folder in which each part has an array beside it (labels, scores)."""
    names = set(list_files(folder))
    return {n for n in names if n.endswith(".parquet") and n.removesuffix(".parquet") + ".npy" in names}


def run_parts(missing: list[int], spans: list[tuple[int, int]], work: Any, arguments: dict[str, Any]) -> Any:
    """Rows that `work` returns, one a part, as Ray Data finishes them; the driver sees nothing else."""
    if not missing:
        return iter(())
    items = [{"part": i, "first": spans[i][0], "stop": spans[i][1]} for i in missing]
    import ray  # not at the top: `inspect` reads parts, and has to start without Ray

    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS)).map_batches(
        work,
        fn_kwargs=arguments,
        batch_size=1,
        batch_format="numpy",
        num_cpus=0.25,
    )
    return dataset.iter_rows()
