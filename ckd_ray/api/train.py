"""`ckd_ray.train`: what `ckd-ray train` does, called from Python."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import yaml

from ckd_ray.api.run import Run, open
from ckd_ray.errors import JobError, UserError
from ckd_ray.jobs.session import session
from ckd_ray.pipeline.closing import closing_table
from ckd_ray.pipeline.graph import check_stage_names
from ckd_ray.pipeline.runner import run_stages
from ckd_ray.progress import set_quiet
from ckd_ray.ray_util.target import parse_target
from ckd_ray.runs.directory import RunContext


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    cluster: str | None = None,
    until: str = "evaluate",
    fresh: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Run all stages: collection, teacher, embed, retrieve, label, distill, evaluate. Finished stages are skipped.

    A Ray that this process is connected to is used, and stays connected.

    Args:
        config: a YAML file, or the keys themselves: `{"collection": {"path": "mydata"}, "distill.steps": 100}`. None
            takes the quick start, as `ckd-ray train` without `--config` does.
        cluster: `local`, or the address of a Ray (HOST:6379); None takes a running Ray, else a local one.
        until: the last stage.
        fresh: do every stage again.
        quiet: print no progress and no table.
        settings: further keys: `**{"distill.steps": 100}`, or of a section `distill={"steps": 100}`. They win over
            those of `config`.

    Returns:
        The run, as `ckd_ray.open` opens it.

    Raises:
        UserError: the configuration or the input is wrong; a `ConfigError` lists all problems of the configuration.
        JobError: the job itself failed. The same call goes on where this one stopped.
    """
    target = parse_target(cluster, "cluster")
    if target is not None and target.remote:
        raise UserError(
            "no job is sent from Python",
            where="cluster",
            expected="local, or the address of a Ray (HOST:6379)",
            found=target.text,
            fix="send it by ckd-ray train --cluster, and open its run by ckd_ray.open",
        )
    check_stage_names(None, until)
    path, given = (None, config) if isinstance(config, Mapping) else (config, {})
    overrides = [_override(key, value) for keys in (given, settings) for key, value in keys.items()]
    set_quiet(quiet)
    with _errors_as_raised(), session(None if path is None else os.fspath(path), overrides, cluster) as loaded:
        closing_table(loaded, run_stages(loaded, until=until, fresh=fresh))
    return open(RunContext.of(loaded).paths.root)


def _override(key: str, value: Any) -> str:
    """The key and its value as `--set` takes them."""
    try:
        # In quotes, so that the text "1e5" stays a text.
        text = yaml.safe_dump(_plain(value), default_style='"', default_flow_style=True, width=2**31)
    except yaml.YAMLError:
        raise UserError(
            "no value of a configuration",
            where=key,
            expected="a number, a text, true or false, None, a list or a mapping of these",
            found=repr(value)[:60],
        ) from None
    return f"{key}={text}"


def _plain(value: Any) -> Any:
    """The value in plain Python types: paths become text, and NumPy scalars become numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


@contextmanager
def _errors_as_raised() -> Iterator[None]:
    """Raise our own errors from tasks and actors without the Ray error around them."""
    try:
        yield
    except (UserError, JobError) as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError | JobError):
            raise cause from error
        raise
