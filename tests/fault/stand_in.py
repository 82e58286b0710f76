"""An encoder that takes its time, computes what can be checked, and writes down every call; and a job to use it on."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckd_ray.checks import load_config
from ckd_ray.data import Collection, build_collection
from ckd_ray.embed.stream import EmbedJob
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.encoder import Encoded
from tests.support import overrides

DIM = 16


class StandIn:
    """Rows that follow from the token ids alone. Appends `start PID FIRST_IDS` and `end ...` to a file of calls.

    While there is a file of that name with `.hold` behind it, a call does not end.
    """

    dim = DIM

    def __init__(self, calls: str, seconds: float) -> None:
        self.calls, self.seconds = calls, seconds
        self.table = torch.nn.functional.normalize(torch.randn(512, DIM, generator=torch.Generator().manual_seed(1)))

    def passages(self, tokens: Sequence[Any]) -> Encoded:
        flat = np.concatenate(tokens).astype(np.int32)
        name = f"{os.getpid()} {flat.tobytes().hex()[:400]}"
        self._write(f"start {name}")
        time.sleep(self.seconds)
        while os.path.exists(f"{self.calls}.hold"):
            time.sleep(0.02)
        self._write(f"end {name}")
        lengths = np.array([len(t) for t in tokens], np.int32)
        return Encoded(lengths, flat, self.table[torch.from_numpy(flat % 512).long()].half())

    def queries(self, texts: Sequence[str]) -> Encoded:
        raise NotImplementedError

    def _write(self, line: str) -> None:
        with open(self.calls, "a") as file:
            file.write(line + "\n")


class Calls:
    """What the encoders of a job have written down."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def started(self) -> list[str]:
        """The texts of every call, in order."""
        return [text for kind, _, text in self.lines() if kind == "start"]

    def ended(self) -> list[str]:
        return [text for kind, _, text in self.lines() if kind == "end"]

    def in_the_middle(self) -> list[int]:
        """Processes that are encoding now."""
        busy: dict[str, int] = {}
        for kind, pid, _ in self.lines():
            busy[pid] = busy.get(pid, 0) + (1 if kind == "start" else -1)
        return [int(pid) for pid, n in busy.items() if n > 0]


def make_encoder(calls: Path, seconds: float, most_bytes: int | None = None) -> Callable[[EmbedJob, int], StandIn]:
    """For `embed_texts`. With `most_bytes` no file of the actor may be longer: the next thing to a full disk."""

    def make(job: EmbedJob, threads: int) -> StandIn:
        if most_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
        return StandIn(str(calls), seconds)

    return make


def prepare_run(storage: Path, backbone: str, collection: str) -> tuple[str, int]:
    """A run with a collection and an untrained teacher, made without Ray. Returns its folder and its passages."""
    config = load_config(None, overrides(storage, backbone, collection))
    run = str(storage / "tiny")
    build_collection(config.collection, run)
    settings = ColBERTSettings(dim=DIM, query_maxlen=12, doc_maxlen=48)
    ColBERT.from_backbone(backbone, settings, seed=1).save(Path(run) / "teacher")
    return run, Collection.open(run).num_passages


def job_of(run: str, out: Path | str) -> EmbedJob:
    return EmbedJob(
        run=run,
        texts="passages",
        checkpoint=os.path.join(run, "teacher"),
        out=str(out),
        fingerprint="f",
        token_budget=1024,
        precision="fp32",
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def identity(folder: Path) -> dict[str, tuple[int, int]]:
    """(inode, time of the last change) of every shard: a shard that is written anew has others."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.arrow"))}
