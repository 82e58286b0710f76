"""Event files of TensorBoard, in `tracking/tensorboard/` of the run."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pyarrow as pa
import yaml
from tensorboardX import SummaryWriter  # type: ignore[import-untyped]
from tensorboardX.summary import hparams  # type: ignore[import-untyped]

from ckd_ray.files import filesystem_of, is_local, join, write_atomic
from ckd_ray.tracking.run import Status, TrackedRun, flat

_UPLOAD_EVERY_S = 60.0


class TensorBoard:
    """See `Tracker`. A run in object storage has its events in a local folder, from which they are uploaded."""

    def __init__(self, run: TrackedRun, identity: str | None) -> None:
        self.identity = self._folder = join(run.folder, "tensorboard")
        self._config = flat(run.config)
        self._temporary = None if is_local(self._folder) else tempfile.TemporaryDirectory()
        self._local = self._temporary.name if self._temporary else filesystem_of(self._folder)[1]
        self._writer = SummaryWriter(self._local, flush_secs=10)
        text = yaml.safe_dump(run.config, sort_keys=False)
        self._writer.add_text("config", f"    {text.rstrip()}".replace("\n", "\n    "))
        self._summary: dict[str, float] = {}
        self._uploaded = time.monotonic()

    def scalars(self, values: Mapping[str, float], step: int, time: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time)
        self._upload()

    def summary(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, 0)
        self._summary |= values

    def close(self, status: Status) -> None:
        """The dashboard HPARAMS gets the configuration and the values of the whole run."""
        plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in self._config.items()}
        for part in hparams(plain, self._summary):
            self._writer.file_writer.add_summary(part)
        self._writer.close()
        self._upload(at_once=True)
        if self._temporary:
            self._temporary.cleanup()

    def _upload(self, at_once: bool = False) -> None:
        if self._temporary is None or not (at_once or time.monotonic() - self._uploaded > _UPLOAD_EVERY_S):
            return
        self._uploaded = time.monotonic()
        if not at_once:
            self._writer.flush()
        for file in Path(self._local).iterdir():
            write_atomic(join(self._folder, file.name), partial(_copy, file))


def _copy(file: Path, stream: pa.NativeFile) -> None:
    stream.write(file.read_bytes())
