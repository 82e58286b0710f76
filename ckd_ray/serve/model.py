"""The student that a server answers with, and its replacement while it answers."""

from __future__ import annotations

import threading
from typing import Any

from ckd_ray.errors import JobError, UserError, first_line
from ckd_ray.files import is_local
from ckd_ray.runs.artifact import identity_of
from ckd_ray.runs.directory import RunDir
from ckd_ray.runs.finished import open_finished
from ckd_ray.search.searcher import Searcher

_LOOK_S, _LOOK_REMOTE_S = 2.0, 30.0


class LiveSearcher:
    """A searcher of a run's student or teacher. When the run has another one, it is loaded beside the one that answers
    and takes its place at once; a request keeps the one that it began with.

    A run whose new student has no embeddings yet, or that is being written, goes on with the former one.

    Attributes:
        answering: the identity of the model, and its searcher.

    Args:
        run: a path or URI.

    Raises:
        UserError: the run has no such model to search with.
    """

    def __init__(self, run: str, system: str = "student") -> None:
        self.run, self.system = run, system
        self.waits_for: str | None = None
        self._loading = threading.Lock()
        self.answering = self._loaded()  # one attribute, so that nobody sees a half of the change

    def look(self) -> bool:
        """Load the run's model if it is another one. Returns whether it was replaced; `waits_for` says why not."""
        with self._loading:
            try:
                if self._identity() == self.answering[0]:
                    self.waits_for = None
                    return False
                self.answering = self._loaded()
            except (UserError, JobError, OSError) as error:
                self.waits_for = first_line(error)
                return False
            self.waits_for = None
            return True

    def watch(self) -> None:
        """Look every few seconds, in a thread that ends with the process."""
        pause = _LOOK_S if is_local(self.run) else _LOOK_REMOTE_S

        def follow() -> None:
            never = threading.Event()
            while not never.wait(pause):
                self.look()

        threading.Thread(target=follow, name="student-watch", daemon=True).start()

    def state(self) -> dict[str, Any]:
        """As JSON."""
        identity, searcher = self.answering
        return {
            "run": self.run,
            "system": self.system,
            "model": identity,
            "passages": searcher.store.num_passages,
            "waits_for": self.waits_for,
        }

    def _paths(self) -> RunDir:
        return open_finished(self.run).paths

    def _identity(self) -> str:
        return identity_of(self._paths().checkpoint(self.system))

    def _loaded(self) -> tuple[str, Searcher]:
        """The model and its shards, all opened: an open file is readable when another has taken its name."""
        identity = self._identity()
        searcher = Searcher(open_finished(self.run), self.system)
        for shard in range(searcher.store.num_shards):
            searcher.store.shard(shard)
        searcher.search("warm up", 1)
        if self._identity() != identity:
            raise JobError("the model of this run was replaced while it was read")
        return identity, searcher
