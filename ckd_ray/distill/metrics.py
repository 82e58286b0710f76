"""The records of a training, in parts: each checkpoint closes a part, as JSON lines and as TensorBoard events.

The step names the part, so a step that is repeated after a crash writes the same file again, and no file grows with the
run. The driver joins the parts at the end. A record holds step, loss, learning_rate, gradient_norm, target_entropy,
target_entropy_share, label_mass, seconds, workers, time, and mrr@10 where dev was measured.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckd_ray.files import filesystem_of, join, list_files, write_atomic

Record = dict[str, Any]

# What TensorBoard and other trackers are told of a record.
SCALARS = (
    "loss", "learning_rate", "gradient_norm", "target_entropy", "target_entropy_share", "label_mass", "seconds",
    "mrr@10",
)  # fmt: skip


def write_part(folder: str, stage: str, next_step: int, records: Sequence[Record]) -> None:
    """Write the records before `next_step` into `folder`, where `tensorboard --logdir RUN` finds the events."""
    if not records:
        return
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    write_atomic(join(folder, f"{next_step:08d}.jsonl"), lambda stream: stream.write(lines))
    events = event_bytes(stage, records)
    # TensorBoard reads the files of a folder in the order of their names.
    name = f"events.out.tfevents.{next_step:08d}.ckd-ray"
    write_atomic(join(folder, name), lambda stream: stream.write(events))


def read_parts(folder: str, stop: int) -> list[Record]:
    """All records before step `stop`, in the order of their steps, each once."""
    by_step: dict[int, Record] = {}
    for name in list_files(folder, ".jsonl"):
        fs, path = filesystem_of(join(folder, name))
        with fs.open_input_stream(path) as stream:
            for line in stream.read().decode().splitlines():
                record = json.loads(line)
                by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step) if step < stop]


def event_bytes(stage: str, records: Sequence[Record]) -> bytes:
    """A TensorBoard event file with the scalars of the records, such as `distill/loss`."""
    from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for record in records:
                for name in SCALARS:
                    if name in record:
                        writer.add_scalar(f"{stage}/{name}", record[name], record["step"], walltime=record["time"])
        (file,) = Path(folder).iterdir()
        return file.read_bytes()
