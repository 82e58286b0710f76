"""What a stage of a run is; `stages/` has one file a stage, `graph.py` has them in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ckd_ray.config import Config
from ckd_ray.runs.artifact import identity_of
from ckd_ray.runs.directory import RunContext, RunDir


@dataclass(frozen=True)
class Stage:
    """One stage. Looking at it needs neither Ray nor a model: only `run` imports what it works with.

    Attributes:
        inputs: names of the stages whose output it reads.
        output: the artifact whose manifest says that the stage is done.
        fingerprint_settings: the part of the configuration that changes the result.
        run: does the work, given the run and the stage's fingerprint; returns figures for the manifest, of which
            `count` and `unit` are shown when the stage ends.
        extra_outputs: folders that are written together with the output, each with a manifest of its own.
        replace_atomically: a new output takes the place of the former one all at once (see `artifact.make`).
        identity: what later stages depend on, given the finished output.
    """

    name: str
    inputs: Callable[[Config], tuple[str, ...]]
    output: Callable[[RunDir], str]
    fingerprint_settings: Callable[[Config], dict[str, Any]]
    run: Callable[[RunContext, str], dict[str, Any]]
    extra_outputs: Callable[[RunDir], tuple[str, ...]] = lambda run: ()
    replace_atomically: bool = False
    identity: Callable[[str], str] = identity_of
