"""The stages without Ray and without training, in a process that is forked, broken and started again many times.

    python -m tests.fault.soak_parts --faults 200 --seed 1 --out tests/fault/faults_parts.json

Collection, embed, retrieve, label and the measuring of `evaluate` run with the product's own functions, in one process;
where the product hands units of work to Ray they are done one after the other. What is left out is Ray: see `soak.py`.
Every run must end with the bytes of an undisturbed one, or stop with one message and end so when it is started again.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ckd_ray.checks import load_config
from ckd_ray.config import Config
from ckd_ray.data import Collection, build_collection
from ckd_ray.embed import stream as embed_stream
from ckd_ray.errors import JobError, UserError
from ckd_ray.evaluate.measures import measure_parts
from ckd_ray.evaluate.runs import write_trec_run
from ckd_ray.files import delete, join
from ckd_ray.labels import stage as label_stream
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.encoder import Encoded, TextEncoder
from ckd_ray.pipeline.evaluation import RankedParts, labelled_parts, write_measures
from ckd_ray.progress import set_quiet
from ckd_ray.ray_util import parts
from ckd_ray.ray_util.actor_pool import Pool
from ckd_ray.ray_util.processes import end_when_broken
from ckd_ray.retrieve import stream as retrieve_stream
from ckd_ray.retrieve.shard_range import SearchSettings, ShardRange
from ckd_ray.runs.artifact import make
from ckd_ray.store import EmbeddingStore
from tests.fault.soak import _flip, _foreign, _full, _truncate
from tests.fault.soak_command import clock_in_reach
from tests.fault.soaking import Fault, cut_address_space
from tests.support import overrides, tiny_bert, write_collection

STAGES = ("collection", "embed", "retrieve", "label", "evaluate")
_BAD = 33  # the passage on which the encoder fails in every tenth run
_STOP_S = 1.0


def serial_stream(jobs: list[Any], work: list[dict[str, int]], pool: Pool, make_encoder: Any) -> Iterator[Any]:
    """What `embed` streams through actors, done here."""
    encoder = embed_stream.ShardEncoder(jobs, 1, make_encoder)
    for unit in work:
        yield from encoder(embed_stream._tokenise({k: [v] for k, v in unit.items()}, jobs)).to_pylist()


def serial_parts(
    missing: list[int], spans: Any, work: Any, arguments: dict[str, Any], cpus: float = 1
) -> Iterator[Any]:
    """What `retrieve` and `label` hand to tasks, done here."""
    for i in missing:
        batch = {"part": [i], "first": [spans[i][0]], "stop": [spans[i][1]]}
        yield from work(batch, **arguments).to_pylist()


class Here:
    """The servers of a store, in this process."""

    cpus = 1.0

    def __init__(self, store: EmbeddingStore) -> None:
        self.range = ShardRange(store, range(store.num_shards), SearchSettings("exact"), "cpu")

    def search(self, queries_BQD: Any, depth: int) -> Any:
        found = self.range.search(torch.from_numpy(queries_BQD), depth)
        self.range.check_unchanged()  # as ShardServer does
        return found


class Fragile(TextEncoder):
    """Raises on one passage, every time."""

    bad = b""

    def passages(self, tokens: Any) -> Encoded:
        if any(np.asarray(ids, np.int32).tobytes() == self.bad for ids in tokens):
            raise ZeroDivisionError("a strange token")
        return super().passages(tokens)


class Job:
    """The stages of one run, in a child process."""

    def __init__(self, config: Config, run: str, teacher: str, stage: Any, fragile: bool) -> None:
        self.config, self.run, self.teacher, self.stage, self.fragile = config, run, teacher, stage, fragile

    def all(self) -> None:
        """Every stage that is not done."""
        for i, name in enumerate(STAGES):
            self.stage.value = i
            folder = {"collection": "corpus", "embed": "embeddings", "retrieve": "rankings", "label": "labels"}
            out = join(self.run, folder.get(name, "evaluation"))
            try:
                make(out, f"{name}-1", getattr(self, name))
            except UserError:
                raise
            except Exception:
                if name in ("collection", "embed") or not self._remove_broken():
                    raise
                make(join(self.run, "embeddings"), "embed-1", self.embed)
                make(out, f"{name}-1", getattr(self, name))

    def _remove_broken(self) -> bool:
        """As pipeline/repair.py does in Ray tasks."""
        found = False
        for texts in ("passages", "queries.train", "queries.dev"):
            store = EmbeddingStore.open(join(self.run, "embeddings", texts))
            for name in [*store.verify(), *store.verify_other_files()]:
                delete(join(store.uri, name))
                found = True
        return found

    def collection(self) -> None:
        build_collection(self.config.collection, self.run)

    def embed(self) -> None:
        collection, jobs = Collection.open(self.run), []
        counts = {"passages": collection.num_passages}
        counts |= {f"queries.{split}": collection.num_queries(split) for split in ("train", "dev")}
        for texts, count in counts.items():
            out = join(self.run, "embeddings", texts)
            job = embed_stream.EmbedJob(
                self.run, texts, self.teacher, out, f"embed-1/{texts}", "auto", "fp32", max_bad=1
            )
            jobs.append((job, embed_stream.plan_shards(count, self.config.embed.passages_per_shard)))
        embed_stream.embed_texts(jobs, self.config.embed, make_encoder=self._encoder)

    def _encoder(self, job: Any, threads: int) -> Any:
        torch.set_num_threads(1)
        model = ColBERT.from_pretrained(self.teacher)
        if not self.fragile:
            return TextEncoder(model)
        encoder = Fragile(model)
        text = Collection.open(self.run).texts([_BAD])
        encoder.bad = model.tokenizer.passages(text)[0].tobytes()
        return encoder

    def _rank(self, split: str, out: str) -> int:
        store = EmbeddingStore.open(join(self.run, "embeddings", "passages"))
        count = Collection.open(self.run).num_queries(split)
        job = retrieve_stream.RetrieveJob(self.run, split, join(self.run, "embeddings", f"queries.{split}"), out, 20)
        retrieve_stream.retrieve(job, Here(store), count)  # type: ignore[arg-type]
        return count

    def retrieve(self) -> None:
        self._rank("train", join(self.run, "rankings"))

    def label(self) -> None:
        job = label_stream.LabelJob(
            self.run, "train", self.teacher, join(self.run, "embeddings", "passages"), join(self.run, "rankings"),
            join(self.run, "labels"), self.config.label,
        )  # fmt: skip
        label_stream.label(job, None, Collection.open(self.run).num_queries("train"))

    def evaluate(self) -> None:
        out, collection = join(self.run, "evaluation"), Collection.open(self.run)
        parts = RankedParts(
            join(out, "rankings", "teacher"), "dev", self._rank("dev", join(out, "rankings", "teacher"))
        )
        write_trec_run(join(out, "teacher.dev.run"), parts, "soak")
        found = measure_parts(labelled_parts(parts, collection), ["MRR@10", "nDCG@10"])
        write_measures(out, {"dev": {"teacher": found}}, self.config, collection)


def digests(run: Path) -> dict[str, str]:
    """Every file of the run but its manifests, which hold times."""
    skipped = ("_manifest.json", "_making.json")
    files = [p for p in sorted(run.rglob("*")) if p.is_file() and p.name not in skipped]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def child(job: Job, said: Path) -> None:
    """In the forked process: the job, its last words in a file, and the status that the command line would give."""
    clock_in_reach()
    end_when_broken()
    code = 0
    try:
        job.all()
    except (UserError, JobError) as error:
        code = 2 if isinstance(error, UserError) else 1
        said.write_text(str(error))
    except Exception as error:  # what `guarded` shows of it
        code = 1
        said.write_text(f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[-1]}")
    finally:
        os._exit(code)


def _signal(number: int) -> Callable[[Any, int, Path], str]:
    def act(soak: Any, pid: int, storage: Path) -> str:
        os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(_STOP_S)
            os.kill(pid, signal.SIGCONT)
        return "the process"

    return act


def _no_memory(soak: Any, pid: int, storage: Path) -> str:
    cut_address_space(pid)
    return "the process"


def _read_only(soak: Any, pid: int, storage: Path) -> str:
    for _ in range(200):  # while a file is open for writing the system refuses
        done = subprocess.run(["mount", "-o", "remount,ro", str(storage)], capture_output=True)
        if done.returncode == 0:
            return "the disk"
    return ""


def _file(act: Callable[[Any, Any, Path], str]) -> Callable[[Any, int, Path], str]:
    return lambda soak, pid, storage: act(soak, None, storage)


KINDS: dict[str, Callable[[Any, int, Path], str]] = {
    "kill": _signal(signal.SIGKILL),
    "stop for a second": _signal(signal.SIGSTOP),
    "clock jumps a day": _signal(signal.SIGUSR1),
    "no memory": _no_memory,
    "disk full": _file(_full),
    "read-only": _read_only,
    "shard: one bit": _file(_flip),
    "shard: cut off": _file(_truncate),
    "shard: of another run": _file(_foreign),
}


class Soak:
    """All runs, on one tmpfs that is emptied between them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self.faults = folder, random.Random(seed), list[Fault]()
        self.disk = folder / "disk"
        self.disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(self.disk)], check=True)
        # At most eight shards a store: more are checked in Ray tasks.
        collection = write_collection(folder / "collection", passages=160, queries=300)
        self.stage = multiprocessing.Value(ctypes.c_int, 0, lock=False)
        values = overrides(
            self.disk,
            str(folder / "encoder"),
            str(collection),
            "label.token_vote=feedback",
            "embed.passages_per_shard=40",
        )
        self.config = load_config(None, values)
        self.donor: Path | None = None

    def fork(self, work: Callable[[], None]) -> int:
        """A child that does `work`, which never returns."""
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(70)
        return pid

    def prepare(self) -> None:
        """The encoder, the teacher, and the undisturbed runs, made in children: this process computes nothing, so that
        it can be forked."""

        def teacher() -> None:
            backbone = tiny_bert(self.folder / "encoder")
            settings = ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)
            ColBERT.from_backbone(backbone, settings, seed=1).save(self.folder / "teacher")
            os._exit(0)

        assert os.waitpid(self.fork(teacher), 0)[1] == 0
        self.expected, self.usual = {}, {}
        for fragile in (False, True):
            started = time.monotonic()
            run = self.disk / "tiny"
            pid = self.fork(lambda: child(self._job(fragile), self.folder / "said"))  # noqa: B023
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert code == 0, (self.folder / "said").read_text()
            self.usual[fragile] = time.monotonic() - started
            self.expected[fragile] = digests(run)
            shutil.copytree(run, self.folder / f"undisturbed-{fragile}" / "tiny")
            shutil.rmtree(run)
        self.donor = self.folder / "undisturbed-False" / "tiny"

    def _job(self, fragile: bool) -> Job:
        return Job(self.config, str(self.disk / "tiny"), str(self.folder / "teacher"), self.stage, fragile)

    def run(self, number: int) -> list[Fault]:
        """One run with up to three faults."""
        fragile, mine, trouble, started = number % 10 == 9, list[Fault](), "", time.monotonic()
        if fragile:
            mine.append(Fault("bad passage", "embed", number, 0.0, f"p{_BAD}", "went on", "set aside, named"))
        wanted = self.rng.randint(1, 3)
        said = self.folder / "said"
        for attempt in range(12):
            said.unlink(missing_ok=True)
            pid = self.fork(lambda: child(self._job(fragile), said))
            begun, code = time.monotonic(), None
            if attempt < wanted:
                code = self._inject(pid, number, begun, fragile, mine)
            if code is None:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            subprocess.run(["mount", "-o", "remount,rw", str(self.disk)], check=True)
            for ballast in self.disk.glob("ballast-*"):
                ballast.unlink()
            if code == 0:
                break
            last = mine[-1] if mine else None
            told = said.read_text() if said.exists() else ""
            if last is not None and last.kind != "bad passage":
                last.outcome = "stopped, completed when run again"
                last.cause = (
                    last.cause or told.replace(str(self.folder), "DIR").splitlines()[0][:200] if told else "killed"
                )
            died = code < 0 and last is not None and last.kind in ("kill", "no memory")
            # Without memory for a thread's data the C library ends the process (127), and without memory for the first
            # call of a thread ours does (1), each with a word of its own on stderr.
            died = died or (code in (1, 127) and not told and last is not None and last.kind == "no memory")
            if not died and (code not in (1, 2) or not told):
                trouble = trouble or f"exit status {code}, said {told[:100]!r}"
        if code != 0:
            trouble = trouble or "does not complete when run again"
        elif not trouble:
            found, expected = digests(self.disk / "tiny"), self.expected[fragile]
            wrong = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
            # A shard that is broken after its last reader has gone is found by the next one.
            wrong = [k for k in wrong if not self._late(k, mine)]
            trouble = f"differs: {', '.join(wrong[:4])}" if wrong else ""
        for fault in mine:
            fault.outcome = f"FAILED: {trouble}" if trouble else fault.outcome or "went on"
            fault.extra = round(max(0.0, time.monotonic() - started - self.usual[fragile]) / max(1, len(mine)), 2)
        shutil.rmtree(self.disk / "tiny", ignore_errors=True)
        return mine

    def _late(self, name: str, mine: list[Fault]) -> bool:
        return any(f.kind.startswith("shard") and f.hit.startswith(f"tiny/{name}") for f in mine)

    def _inject(self, pid: int, number: int, begun: float, fragile: bool, mine: list[Fault]) -> int | None:
        """Break something at a random moment; the status of a child that had ended before."""
        least = min(KINDS, key=lambda k: (sum(f.kind == k for f in self.faults + mine), self.rng.random()))
        moment = self.rng.uniform(0.02, 1.0) * self.usual[fragile]
        late = least.startswith("shard")  # shards are there in the second half
        time.sleep(max(0.0, begun + (0.5 * self.usual[fragile] + moment / 2 if late else moment) - time.monotonic()))
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:  # the machine is quieter than it was: aim earlier
            self.usual[fragile] = max(0.3, 0.8 * self.usual[fragile])
            return os.waitstatus_to_exitcode(status)
        stage = STAGES[self.stage.value]
        with suppress(ProcessLookupError, FileNotFoundError):
            hit = KINDS[least](SimpleNamespace(rng=self.rng, donor=self.donor), pid, self.disk)
            if hit:
                mine.append(Fault(least, stage, number, round(time.monotonic() - begun, 2), hit))
        return None


def main() -> None:
    """Inject the faults and write the record."""
    from tests.fault.soak_table import rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    set_quiet(True)
    embed_stream._stream = serial_stream
    embed_stream.place_pool = lambda *_, **__: Pool(1, 1.0, 0.0, 1, 1, 0.1)
    parts.run_parts = serial_parts
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="ckd-soak-"))
    # What every child would load anew; importing starts no threads, so the process can still be forked.
    import ir_measures  # noqa: F401
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast  # noqa: F401

    from ckd_ray.model import linears  # noqa: F401

    soak, number = Soak(folder, arguments.seed), 0
    try:
        soak.prepare()
        while len(soak.faults) < arguments.faults and time.monotonic() - began < 60 * arguments.minutes:
            mine = soak.run(number)
            soak.faults += mine
            number += 1
            for fault in mine:
                print(f"run {number}: {fault.kind} in {fault.stage}: {fault.outcome} {fault.cause}", flush=True)
            record = {
                "command": f"python -m tests.fault.soak_parts {' '.join(sys.argv[1:])}",
                "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]},
                "runs": number,
                "seconds": round(time.monotonic() - began, 1),
                "undisturbed_seconds": round(soak.usual[False], 2),
                "injected": len(soak.faults),
                "failed": sum(f.outcome.startswith("FAILED") for f in soak.faults),
                "table": rows([asdict(f) for f in soak.faults], [*KINDS, "bad passage"], list(STAGES)),
                "faults": [asdict(f) for f in soak.faults],
            }
            Path(arguments.out).write_text(json.dumps(record, indent=1) + "\n")
    finally:
        subprocess.run(["umount", "-l", str(soak.disk)], check=False)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
