"""`run.json`: the configuration and the versions of a run, for whoever opens it later.

Its `schema` is the version of the run directory. Version 1 (ckd-ray 0.1, which wrote no such key) has the same folders,
so it is opened as it is; the record of a variant does not say where its labels are. In version 2 it does. In version 3
names of files that are no part of a table begin with `_`, so that other programs read the folder of a table as it is;
the former names are read where they are found. In version 4 the vectors of labels are in their Parquet files alone.
"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from typing import Any

from ckd_ray import __version__
from ckd_ray.errors import UserError
from ckd_ray.files import check_inside, exists, read_object, write_json_atomic
from ckd_ray.progress import without_secrets
from ckd_ray.runs.directory import LABELS, RunContext, RunDir, labels_folder

SCHEMA = 4
_LIBRARIES = ("ray", "torch", "transformers", "pyarrow", "faiss-cpu", "numpy")


def read_record(uri: str) -> dict[str, Any]:
    """The record at `uri`.

    Raises:
        UserError: it is no record of a run, or one of a later version of ckd-ray.
    """
    record = read_object(uri)
    if not isinstance(record.get("config", {}), dict):
        raise UserError("not the record of a run", where=uri, expected="a section config")
    schema = record.get("schema", 1)
    if schema not in range(1, SCHEMA + 1):
        raise UserError(
            "this run directory is of a version that this ckd-ray does not know",
            where=uri,
            expected=f"schema {SCHEMA} or earlier (ckd-ray {__version__})",
            found=f"schema {schema!r} (ckd-ray {record.get('ckd_ray', 'unknown')})"[:200],
            fix="install the version of ckd-ray that wrote it, or choose another run.name",
        )
    return record


def labels_of(paths: RunDir, record: dict[str, Any]) -> str:
    """The folder, below the run, of the labels that the student of `record` is distilled from."""
    if record.get("schema", 1) > 1:
        labels = str(record.get("labels", LABELS))
        check_inside([labels], paths.record)
        return labels
    # Schema 1: a search kept labels of other settings than the run's beside them.
    base = RunDir(paths.root).record
    if paths.variant_name and exists(base):
        mine = record.get("config", {}).get("label")
        if isinstance(mine, dict) and mine != read_record(base).get("config", {}).get("label"):
            return labels_folder(mine)
    return LABELS


def write_record(context: RunContext) -> None:
    """Write `run.json` of the run or its variant.

    Raises:
        UserError: a later version of ckd-ray has written one there.
    """
    paths = context.paths
    if exists(paths.record):
        read_record(paths.record)
    record = {
        "schema": SCHEMA,
        "ckd_ray": __version__,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _LIBRARIES},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), **_cluster()},
        **({"variant": paths.variant_name} if paths.variant_name else {}),
        **({"labels": paths.labels_name} if paths.labels_name != LABELS else {}),
        "config": context.config.model_dump(mode="json"),
    }
    # Keys that stand in a URI are not kept: a run directory is passed on.
    write_json_atomic(paths.record, json.loads(without_secrets(json.dumps(record))))


def _cluster() -> dict[str, Any]:
    import ray

    if not ray.is_initialized():
        return {}
    have = ray.cluster_resources()
    return {"nodes": sum(n["Alive"] for n in ray.nodes()), "ray_cpus": have.get("CPU", 0), "gpus": have.get("GPU", 0)}
