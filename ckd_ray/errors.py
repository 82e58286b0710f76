"""The two ways in which a command fails: by the user's input (exit status 2) or by the job (exit status 1)."""

from __future__ import annotations


class UserError(ValueError):
    """Input or configuration that the user can mend; shown without a traceback, exit status 2.

    Args:
        problem: one sentence, what is wrong.
        where: the file and line, the configuration key, or the option.
        expected: what would have been accepted.
        found: what stood there (shortened to one line by the caller).
        fix: the next thing to do.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.where, self.expected, self.found, self.fix = problem, where, expected, found, fix
        lines = [f"{where}: {problem}" if where else problem]
        for name, value in (("expected", expected), ("found", found), ("fix", fix)):
            if value is not None:
                lines.append(f"  {name}: {value}")
        super().__init__("\n".join(lines))


class JobError(RuntimeError):
    """The job itself failed (a lost cluster, a full disk, a diverged loss); exit status 1."""


class LostRayError(JobError):
    """The Ray of this process is gone, so nothing that needs it can be tried any more."""
