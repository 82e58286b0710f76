"""What every stage is given: the configuration and the run directory."""

from __future__ import annotations

from dataclasses import dataclass

from ckd_ray.config import Config
from ckd_ray.store.files import filesystem_of, join


@dataclass(frozen=True)
class RunContext:
    """A run: `config`, and `run`, the absolute path or URI of its directory."""

    config: Config
    run: str

    @classmethod
    def of(cls, config: Config) -> RunContext:
        """The run directory is `run.storage`/`run.name`."""
        storage = config.run.storage
        if "://" not in storage:
            storage = filesystem_of(storage)[1]
        return cls(config, join(storage, config.run.name))

    def path(self, *parts: str) -> str:
        """A path below the run directory."""
        return join(self.run, *parts)
