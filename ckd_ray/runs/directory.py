"""What every stage is given: the configuration and the run directory."""

from __future__ import annotations

from dataclasses import dataclass

from ckd_ray.config import Config
from ckd_ray.files import filesystem_of, join

# What a variant of a run has of its own; everything else is that of the run.
_OF_A_VARIANT = ("student", "student_embeddings", "evaluation", "run.json")


@dataclass(frozen=True)
class RunContext:
    """A run: `config`, and `run`, the absolute path or URI of its directory.

    `variant` is a folder below it for another student (of another objective or seed) that shares the collection,
    teacher, embeddings, rankings and labels of the run. `labels` is where the labels are, for a search over settings of
    the labels.
    """

    config: Config
    run: str
    variant: str | None = None
    labels: str = "labels"

    @classmethod
    def of(cls, config: Config, variant: str | None = None, labels: str = "labels") -> RunContext:
        """The run directory is `run.storage`/`run.name`."""
        storage = config.run.storage
        if "://" not in storage:
            storage = filesystem_of(storage)[1]
        return cls(config, join(storage, config.run.name), variant, labels)

    def path(self, *parts: str) -> str:
        """A path below the run directory, or below the variant's for what it has of its own."""
        if self.variant and parts and parts[0] in _OF_A_VARIANT:
            return join(self.run, self.variant, *parts)
        if parts and parts[0] == "labels":
            return join(self.run, self.labels, *parts[1:])
        return join(self.run, *parts)
