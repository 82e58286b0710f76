"""The trials of a search on disk: a small JSON file for each, written when it begins, is measured, and ends.

An interrupted search resumes from them; nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ckd_ray.files import join, list_files, make_folder, read_json, write_json_atomic
from ckd_ray.progress import without_secrets
from ckd_ray.tune.space import Values

State = Literal["running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """One trial.

    Attributes:
        number: from 0, the trial of the configuration itself.
        state: `stopped` means by the scheduler, because other trials were better.
        measurements: [steps, MRR@10 on dev, seconds since the start] in ascending steps.
        ended: the number of trials that ended before it; None while it runs.
        cause: why it failed.
    """

    number: int
    values: Values
    state: State = "running"
    measurements: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    ended: int | None = None
    cause: str | None = None

    @property
    def best(self) -> float | None:
        """The best measurement."""
        return max((m[1] for m in self.measurements), default=None)

    @property
    def steps(self) -> int:
        """Steps taken before the last measurement."""
        return int(self.measurements[-1][0]) if self.measurements else 0


class Records:
    """All trials of a search, in `folder`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        make_folder(folder)
        found = [Trial(**read_json(join(folder, name))) for name in list_files(folder, ".json")]
        self.trials: dict[int, Trial] = {trial.number: trial for trial in sorted(found, key=lambda t: t.number)}

    def write(self, trial: Trial) -> None:
        """Write the present state of a trial."""
        self.trials[trial.number] = trial
        write_json_atomic(join(self.folder, f"trial-{trial.number:05d}.json"), asdict(trial))

    def end(self, trial: Trial, state: State, cause: str | None = None) -> None:
        """Write the end of a trial."""
        trial.state, trial.cause = state, cause and without_secrets(cause)
        trial.ended = sum(t.ended is not None for t in self.trials.values()) if trial.ended is None else trial.ended
        self.write(trial)

    def ended(self) -> list[Trial]:
        """The trials that were finished or stopped, in the order of their ends."""
        done = [t for t in self.trials.values() if t.state in ("finished", "stopped")]
        return sorted(done, key=lambda t: t.ended if t.ended is not None else t.number)

    def best(self) -> Trial | None:
        """The finished trial with the best measurement; the first of equals."""
        finished = [t for t in self.trials.values() if t.state == "finished" and t.best is not None]
        return max(finished, key=lambda t: (t.best or 0.0, -t.number), default=None)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each trial, for the summary and for `trials.parquet`."""
        return [
            {
                "trial": t.number,
                "state": t.state,
                "mrr@10": t.best,
                "steps": t.steps,
                "seconds": round(t.seconds, 1),
                **t.values,
                "cause": t.cause,
            }
            for t in self.trials.values()
        ]
