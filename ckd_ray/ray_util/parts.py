"""Parts: consecutive queries that one task processes and one file holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from ckd_ray.files import join, list_files
from ckd_ray.progress import Progress
from ckd_ray.ray_util.waiting import WORK_S, no_answer

_QUERIES_A_PART = 256
# CPUs that a task with little to compute reserves.
_CPUS_OF_LITTLE = 0.25
# CPUs that a task reserves which mostly waits for the servers of a store. Next to nothing: the task must find a place
# even if the servers of this job and of others hold the cluster, or both jobs would wait for ever.
CPUS_OF_WAITING = 0.001
# Every server takes part in a query, so a few dozen tasks keep all of them busy.
_MOST_WAITING = 32
# Below a folder of Parquet files: arrays for random access. Programs that read the folder pass over such a name.
_ARRAYS = "_rows"
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


def array_file(folder: str, stem: str) -> str:
    """The array of a part, or of a whole split, in a folder of Parquet files."""
    return join(folder, _ARRAYS, f"{stem}.npy")


def former_array_file(folder: str, stem: str) -> str:
    """Where the array is in a run directory of schema 1 or 2."""
    return join(folder, f"{stem}.npy")


def parts_present(folder: str) -> set[str]:
    """The Parquet files of finished parts, in a folder where each part has an array as well (labels, scores)."""
    names = list_files(folder, ".parquet")
    arrays = {*list_files(join(folder, _ARRAYS)), *list_files(folder, ".npy")}
    return {n for n in names if n.removesuffix(".parquet") + ".npy" in arrays}


def finish_parts(
    stage: str,
    split: str,
    num_queries: int,
    present: Collection[str],
    work: Any,
    arguments: dict[str, Any],
    cpus: float = _CPUS_OF_LITTLE,
) -> list[tuple[int, int]]:
    """Run `work` for the parts of a split that are not finished, and show the progress. Returns the spans of all parts.

    Args:
        stage: the word in front of progress lines.
        present: the Parquet files of the finished parts.
        work: see `run_parts`; its row has the number of `queries`.
        cpus: that a task reserves; `CPUS_OF_WAITING` where it asks the servers of a store.
    """
    spans = query_spans(num_queries)
    missing = [i for i in range(len(spans)) if part_file(split, i) not in present]
    done = num_queries - sum(spans[i][1] - spans[i][0] for i in missing)
    with Progress(stage, num_queries, "queries", done=done) as progress:
        for row in run_parts(missing, spans, work, arguments, cpus):
            progress.advance(int(row["queries"]))
    return spans


def run_parts(
    missing: list[int],
    spans: list[tuple[int, int]],
    work: Any,
    arguments: dict[str, Any],
    cpus: float = _CPUS_OF_LITTLE,
) -> Any:
    """The rows that `work` returns, one per part, as they are finished; nothing else reaches the driver."""
    if not missing:
        return iter(())
    dataset = _dataset(missing, spans, work, arguments, cpus)
    return _waiting(dataset.iter_rows())


def part_tables(spans: list[tuple[int, int]], work: Any, arguments: dict[str, Any]) -> Iterator[Any]:
    """What `work` returns as Arrow tables, in the order of the spans; a table may hold the rows of several spans, or
    none. A task takes a core."""
    dataset = _dataset(list(range(len(spans))), spans, work, arguments, 1.0)
    dataset.context.execution_options.preserve_order = True
    return _waiting(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


def _dataset(
    missing: list[int], spans: list[tuple[int, int]], work: Any, arguments: dict[str, Any], cpus: float
) -> Any:
    items = [{"part": i, "first": spans[i][0], "stop": spans[i][1]} for i in missing]
    import ray  # not at the top: `inspect` reads parts, and has to start without Ray

    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS)).map_batches(
        work,
        fn_kwargs=arguments,
        batch_size=1,
        batch_format="numpy",
        num_cpus=cpus,
        compute=ray.data.TaskPoolStrategy(size=_most_waiting(len(items))) if cpus == CPUS_OF_WAITING else None,
    )
    dataset.context.execution_no_progress_timeout_s = WORK_S
    return dataset


def _most_waiting(parts: int) -> int:
    """How many tasks ask servers at a time: one a core, as some of them compute a little."""
    import ray

    return min(parts, max(2, min(_MOST_WAITING, int(ray.cluster_resources().get("CPU", 1.0)))))


def _waiting(found: Iterable[Any]) -> Iterator[Any]:
    import ray

    try:
        yield from found
    except ray.data.exceptions.ExecutionTimeoutError as error:
        raise no_answer("the parts of this stage", WORK_S) from error
