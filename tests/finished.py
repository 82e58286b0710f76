"""One finished run for all test processes of a session. It is read by all; who changes something takes a copy."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support import ALONE, overrides, tiny_bert, write_collection

# Three of the 24 training queries have no label.
UNLABELLED = frozenset({"q2", "q9", "q17"})
SETTINGS = (
    "evaluate.baselines=[encoder,bm25]", "tracking=[tensorboard]", "distill.steps=6", "distill.evaluate_every=3",
    "distill.dev_queries=6", "distill.dev_passages=30",
)  # fmt: skip
_MADE = "made.json"


@dataclass(frozen=True)
class Finished:
    """A run `storage/tiny` and what it was made of."""

    storage: Path

    @property
    def run(self) -> Path:
        return self.storage / "tiny"

    @property
    def backbone(self) -> str:
        return str(self.storage / "backbone")

    @property
    def collection(self) -> str:
        return str(self.storage / "collection")

    def copy(self, storage: Path) -> Path:
        """A copy of the run below another storage; with `values` of that storage every stage is done. Its folder."""
        return Path(shutil.copytree(self.run, storage / "tiny"))

    def values(self, storage: Path, *more: str) -> list[str]:
        """`--set` values of the run, with a single actor wherever one is enough."""
        return overrides(storage, self.backbone, self.collection, *SETTINGS, *ALONE, *more)

    def changed(self) -> list[str]:
        """Files that are not as the run was left."""
        before, now = json.loads((self.storage / _MADE).read_text()), _stamps(self.run)
        return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def finished_once(storage: Path, run: Callable[[list[str]], None]) -> Finished:
    """The finished run below `storage`, made by the first process that asks; the others wait for it.

    Args:
        run: does all stages of a configuration, given by its `--set` values.
    """
    storage.mkdir(exist_ok=True)
    found = Finished(storage)
    with open(storage / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (storage / _MADE).exists():
            shutil.rmtree(found.run, ignore_errors=True)  # of a process that died over it
            tiny_bert(storage / "backbone")
            labels = write_collection(storage / "collection") / "qrels.train.tsv"
            kept = [line for line in labels.read_text().splitlines(True) if line.split("\t")[0] not in UNLABELLED]
            labels.write_text("".join(kept))
            run(overrides(storage, found.backbone, found.collection, *SETTINGS))
            (storage / _MADE).write_text(json.dumps(_stamps(found.run)))
    return found


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    stats = {path.relative_to(folder).as_posix(): os.stat(path) for path in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
