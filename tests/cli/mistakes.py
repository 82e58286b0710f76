"""Mistakes that a new user makes, the message for each, and its remedy.

`python -m tests.cli.mistakes --write docs/reference/errors.md` makes all of them and writes the table.
"""

from __future__ import annotations

import argparse
import gzip
import http.server
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
from typer.testing import CliRunner

from ckd_ray.cli import app
from tests import sound
from tests.support import overrides

# A run of the collection `data` with the encoder `encoder`, both in the folder of the mistake.
SOUND = overrides("runs", "encoder", "data")
PLAIN = {"HF_HUB_OFFLINE": "1", "AWS_EC2_METADATA_DISABLED": "true", "RAY_ADDRESS": "", "COLUMNS": "100"}


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        what: in a few words.
        command: the words after `ckd-ray`; `SETS` stands for the settings of a sound run.
        says: must be in the message.
        remedy: what to do.
        make: spoils the folder, which holds `data`, `encoder` and the finished run `finished`.
        ray: it is found only when Ray has started.
        alone: it needs a process that has not joined a Ray.
        status: the exit status.
    """

    what: str
    command: str
    says: str
    remedy: str
    make: Callable[[Path], object] = lambda folder: None
    environment: dict[str, str] = field(default_factory=dict)
    ray: bool = False
    alone: bool = False
    status: int = 2

    def words(self) -> list[str]:
        """The arguments of the command."""
        sets = " ".join(f"--set {shlex.quote(value)}" for value in SOUND)
        return shlex.split(self.command.replace("SETS", sets).replace("OTHER", something_else()))


def _write(name: str, text: str | bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return make


def _data(name: str, pattern: str, by: str, count: int = 0) -> Callable[[Path], object]:
    """One file of the collection with something replaced."""

    def make(folder: Path) -> None:
        path = folder / "data" / name
        path.write_text(re.sub(pattern, by, path.read_text(), count=count, flags=re.MULTILINE))

    return make


def _without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink() for name in names
    ]


def _commas(folder: Path) -> None:
    for path in (folder / "data").glob("*.tsv"):
        path.write_text(path.read_text().replace("\t", ","))


def _parquet_with_other_names(folder: Path) -> None:
    shutil.rmtree(folder / "data")
    (folder / "data").mkdir()
    sound.parquet(folder / "data")
    pq.write_table(sound.texts("key", ["p1"], ["one"]), folder / "data" / "passages.parquet")


def _other_model(kind: str, **values: object) -> Callable[[Path], object]:
    return _write("model/config.json", json.dumps({"model_type": kind, **values}))


def _held(folder: Path) -> None:
    """The lock of the run, held by a process that lives as long as the test."""
    from ckd_ray.runs.lock import run_lock

    lock = run_lock(str(folder / "runs" / "tiny"))
    lock.__enter__()
    HELD.append(lock)


HELD: list[Any] = []


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class _NotFound(http.server.BaseHTTPRequestHandler):
    """A web server that knows none of the paths of a dashboard."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""


@cache
def something_else() -> str:
    """The address of a web server, in a thread of this process."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"127.0.0.1:{server.server_address[1]}"


NOTHING = f"127.0.0.1:{free_port()}"
_CONFIG = "Configuration"
_DATA, _MODEL, _PLACES, _RAY, _RUNS = "Collection", "Encoder", "Storage", "Ray and clusters", "Finished runs"
MISTAKES: dict[str, list[Mistake]] = {
    _CONFIG: [
        Mistake("the path of the configuration", "train --config mine.yml", "mine.yml: the configuration cannot be read",
                "Look at the name; `ckd-ray init DIR` writes a configuration."),
        Mistake("a bracket that is not closed", "train --config c.yaml", "c.yaml:2: not valid YAML",
                "Mend the line.", _write("c.yaml", "run: {name: mine\nmodel: {dim: 64}\n")),
        Mistake("tabs in YAML", "train --config c.yaml", "c.yaml:2: not valid YAML",
                "Indent with spaces.", _write("c.yaml", "run:\n\tname: mine\n")),
        Mistake("a key that does not exist", "train --set distil.temprature=1", "did you mean distill.temperature?",
                "Take the key that the message proposes, or look it up in [configuration.md](configuration.md)."),
        Mistake("a value of the wrong type", "train --set retrieve.depth=many", "expected an integer, found 'many'",
                "Give a value of that type."),
        Mistake("a value out of range", "train --set distill.temperature=0", "above 0 to 100", "Give one in range."),
        Mistake("`--set` without a value", "train --set distill.steps", "expected key=value", "Write `KEY=VALUE`."),
        Mistake("a format that does not exist", "train --set collection.format=tsv", "expected 'docstrings', 'msmarco'",
                "Take one of the list: `csv` reads TSV with a header line, `msmarco` without; or let `ckd-ray init` choose."),
        Mistake("a stage that does not exist", "train --from embedding", "unknown stage", "Take one of the list."),
    ],
    _DATA: [
        Mistake("the path of the collection", "train SETS --set collection.path=dota",
                "collection.path: this folder does not exist", "Mend the path; a relative one begins where you are."),
        Mistake("no labels", "train SETS", "the collection has no qrels.train.tsv",
                "Put the file there, or name it under `collection.qrels`.", _without("data/qrels.train.tsv")),
        Mistake("no training split", "train SETS", "names the split to train on, of dev, test",
                "Set `collection.train`, or let `ckd-ray init` set dev and test aside.",
                _without("data/queries.train.tsv", "data/qrels.train.tsv")),
        Mistake("files of another format", "train SETS --set collection.format=beir", "set collection.format: msmarco",
                "Set the format that the message names."),
        Mistake("dev is train", "train SETS --set collection.dev=train", "collection.dev: 'train' is trained on, too",
                "Name another split, or let `ckd-ray init` set one aside."),
        Mistake("nothing recognised by `init`", "init data", "no labels (qrels)", "Name the file: `--qrels FILE`.",
                _without("data/qrels.train.tsv", "data/qrels.dev.tsv", "data/qrels.test.tsv")),
        Mistake("ids that do not match, seen by `init`", "init data", "labels name a passage that is not there",
                "Spell the ids in one way in both files.", _data("collection.tsv", "^p", "doc-")),
        Mistake("ids that do not match, seen by `train`", "train SETS", "a label of an unknown passage",
                "Mend the labels, or run `ckd-ray init`, which leaves a few unknown ids out.",
                _data("qrels.train.tsv", r"\tp3\t", r"\tp333\t"), ray=True),
        Mistake("another column", "train SETS --set collection.format=parquet", "no column id",
                "Rename it, or run `ckd-ray init`, which takes any name.", _parquet_with_other_names, ray=True),
        Mistake("an id twice", "train SETS", "a duplicate passage id", "Give each passage an id of its own.",
                _data("collection.tsv", r"^p7\t", r"p8\t"), ray=True),
        Mistake("a query without text", "train SETS", "a labelled query without text", "Write the query, or leave it out.",
                _data("queries.train.tsv", r"^q2\t.*$", r"q2\t"), ray=True),
        Mistake("commas in the place of tabs", "train SETS", "a line without a tab", "`ckd-ray init DIR` reads CSV.",
                _commas, ray=True),
        Mistake("a file cut off on the way", "train SETS", "the file cannot be read", "Copy it again.",
                lambda folder: (_write("data/collection.tsv.gz", gzip.compress(os.urandom(9000), mtime=0)[:4000])(folder),
                                _without("data/collection.tsv")(folder)), ray=True),
        Mistake("a file in another encoding", "train SETS", "is not UTF-8", "`iconv -f latin1 -t utf-8`",
                lambda folder: _write("data/queries.train.tsv", "q0\tcafé?\n".encode("latin-1"))(folder), ray=True),
        Mistake("labels without a positive", "train SETS", "no training query has a positive label",
                "Set `collection.positive_grade`, or look at the last column.",
                _data("qrels.train.tsv", r"\t1$", r"\t0"), ray=True),
    ],
    _MODEL: [
        Mistake("the path of the model", "train SETS --set model.backbone=./models/bert",
                "model.backbone: this folder does not exist", "Mend the path."),
        Mistake("an empty folder", "train SETS --set model.backbone=model", "no model in this folder",
                "Give the folder that holds `config.json`.", lambda folder: (folder / "model").mkdir()),
        Mistake("a model that writes texts", "train SETS --set model.backbone=model", "this model is no encoder",
                "Take an encoder.", _other_model("gpt2")),
        Mistake("a model with a decoder", "train SETS --set model.backbone=model", "this model is no encoder",
                "Take an encoder.", _other_model("t5", is_encoder_decoder=True)),
        Mistake("passages longer than the model's positions", "train SETS --set model.doc_maxlen=512",
                "expected: at most 64", "Lower `model.doc_maxlen`, or take an encoder for longer texts."),
        Mistake("a package that is not installed", "train SETS --set model.backbone=package:some_model/model",
                "is not installed", "Install it."),
        Mistake("a hub id without network", "train SETS --set model.backbone=bert-base-uncased --until teacher",
                "neither a folder here nor a model that the hub gives", "Download the model elsewhere, and name its folder.", ray=True),
    ],
    _PLACES: [
        Mistake("a storage that cannot be written", "train SETS --set run.storage=file/runs",
                "the run directory cannot be written", "Choose another `run.storage`.", _write("file", "x"), ray=True),
        Mistake("a bucket without keys or network", "train SETS --set collection.path=s3://no-such-bucket-ckd/data?region=us-east-1",
                "this storage cannot be read", "Set the keys ([object storage](../how-to/object-storage.md)).",
                environment={"AWS_ENDPOINT_URL": f"http://{NOTHING}", "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}),
        Mistake("a run that another command is working on", "train SETS", "another", "Wait for it, or end it.",
                _held, ray=True),
        Mistake("a full disk", "export finished --format pylate --out out", "cannot be written",
                "Make room and give the command again.", status=1),
        Mistake("`init` over a configuration", "init data --output c.yaml", "this is there already",
                "`--output FILE`, or `--force`.", _write("c.yaml", "run: {}\n")),
    ],
    _RAY: [
        Mistake("an address at which nothing listens", f"train SETS --cluster {NOTHING}", "this Ray cannot be joined",
                "Start the head, or leave `--cluster` out.", alone=True),
        Mistake("the port of something else", "train SETS --cluster OTHER", "does not answer as the head of a Ray does",
                "Give the port of the head, 6379 unless `ray start` was told another.", alone=True),
        Mistake("a RAY_ADDRESS of yesterday", "train SETS", "RAY_ADDRESS: this Ray cannot be joined",
                "`unset RAY_ADDRESS`", environment={"RAY_ADDRESS": NOTHING}, alone=True),
        Mistake("a dashboard that is not there", f"train --cluster http://{NOTHING}", "no dashboard answers here",
                "Mend the address, or open the tunnel."),
        Mistake("a dashboard's address with something else", "train --cluster http://OTHER",
                "is not the dashboard of a Ray", "Mend the address."),
        Mistake("a launcher's file that is not there", "train SETS --cluster aws.yaml", "this file does not exist",
                "Mend the path."),
    ],
    _RUNS: [
        Mistake("no such run", "report runs/mine", "no run here", "Mend the path."),
        Mistake("a report into a folder", "report finished --out data", "this is a folder", "Name a file."),
        Mistake("a search without a student", "search finished ban", "no student", "`ckd-ray train` finishes the run.",
                _without("finished/student", "finished/student_embeddings")),
        Mistake("a search without words", "search finished ' '", "the query is empty", "Give some words."),
        Mistake("0 passages", "search finished ban --top 0", "--top", "Give 1 or more."),
        Mistake("an export into a folder of others", "export finished --format pylate --out mine",
                "this place is in use", "Name a new folder.", _write("mine/thesis.tex", "x")),
        Mistake("an unknown format of exports", "export finished --format gguf", "unknown format", "Take one of the list."),
        Mistake("a look at labels that are not made yet", "inspect finished q1", "this run has no labels yet", "`ckd-ray label` makes them."),
        Mistake("a comparison with a run that is not there", "evaluate SETS --against runs/other", "no run here",
                "Mend the path."),
    ],
}  # fmt: skip
ALL = [mistake for some in MISTAKES.values() for mistake in some]


def lay_out(folder: Path, encoder: str, run: Path, collection: Path) -> None:
    """What every mistake starts from."""
    shutil.copytree(collection, folder / "data")
    (folder / "encoder").symlink_to(encoder)
    shutil.copytree(run, folder / "finished")


def meet(mistake: Mistake, folder: Path) -> tuple[int, str]:
    """Status and messages of the command, run in this process. Where it needs Ray, this process has joined one already.
    The full disk is a limit on the size of files, and has a process of its own."""
    command, full = [sys.executable, "-m", "ckd_ray", *mistake.words()], mistake.what == "a full disk"
    if full or mistake.alone:
        if full:
            command = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command]
        environment = {**os.environ, **PLAIN, **mistake.environment}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
        return done.returncode, done.stderr
    joined = mock.patch("ckd_ray.jobs.session.connected", lambda target: nullcontext())
    before = os.getcwd()
    os.chdir(folder)
    try:
        with (
            mock.patch.dict(os.environ, {**PLAIN, **mistake.environment}),
            mock.patch("ckd_ray.files.paths._ATTEMPTS", 1),  # eight take a minute
            joined if mistake.ray else nullcontext(),
        ):
            result = CliRunner().invoke(app, mistake.words())
    finally:
        os.chdir(before)
        while HELD:
            HELD.pop().__exit__(None, None, None)
    return result.exit_code, result.output


def told(stderr: str, folder: Path) -> str:
    """The message alone, in one line, without the folders and ports of this machine."""
    text = stderr.rpartition("ckd-ray: ")[2] if "ckd-ray: " in stderr else stderr
    text = text.partition("\n  (what Ray and other")[0].replace(f"{folder}/", "").replace(str(folder), "DIR")
    text = re.sub(r"process \d+ on \S+ since [\d: -]+\d", "process PID on HOST since TIME", text)
    text = text.replace(NOTHING, "HOST:PORT").replace(something_else(), "HOST:PORT")
    text = re.sub(r"[╭╮╰╯│─]+", " ", text)
    return " ".join(line.strip() + ";" for line in text.splitlines() if line.strip()).removesuffix(";")


def row(mistake: Mistake, message: str, status: int) -> str:
    """A row of the page."""
    command = mistake.command.replace(NOTHING, "HOST:PORT").replace("OTHER", "HOST:PORT").replace(" SETS", "")
    message = message if len(message) <= 460 else message[:456] + " ..."
    message = message.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return f"| {mistake.what}: `{command}` | {status} | {message} | {mistake.remedy} |"


HEAD = """# Common mistakes

What a command says, and what to do then. The tests make each of these mistakes (`tests/cli/test_mistakes.py`), and this
page is written by `python -m tests.cli.mistakes --write docs/reference/errors.md`. The commands leave out what is right
in them. [Bad input](bad_input.md) has the messages about broken files, [Exit statuses](exit_codes.md) what 1 and 2 mean.
`ckd-ray doctor` finds what is missing on a machine before a command does.

These are no mistakes: a `--top` or a depth above the number of passages (all of them are ranked), and
another configuration in the folder of a run (what depends on the change is done again).
"""


def page(rows: dict[str, list[str]]) -> str:
    """docs/reference/errors.md."""
    parts = [HEAD]
    for title, some in rows.items():
        parts.append(
            f"## {title}\n\n| mistake | exit | message | remedy |\n|---|---|---|---|\n" + "\n".join(some) + "\n"
        )
    return "\n".join(parts)


def main() -> None:
    """Make all mistakes and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", required=True)
    arguments = parser.parse_args()
    import ray

    from tests.evidence import hand_made_run
    from tests.support import tiny_bert, write_collection

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch).resolve()
        encoder = tiny_bert(base / "encoder")
        run = hand_made_run(base / "runs", encoder, write_collection(base / "c"))
        collection = write_collection(base / "data")
        rows: dict[str, list[str]] = {}
        for title, some in MISTAKES.items():
            for i, mistake in enumerate(some):
                folder = base / f"{title}-{i}"
                folder.mkdir()
                lay_out(folder, encoder, run, collection)
                mistake.make(folder)
                status, stderr = meet(mistake, folder)
                message = told(stderr, folder)
                rows.setdefault(title, []).append(row(mistake, message, status))
                if status != mistake.status or mistake.says not in stderr or "Traceback" in stderr:
                    print(f"{mistake.what}: {status}: {stderr}", file=sys.stderr)
                print(rows[title][-1])
                shutil.rmtree(folder)
    Path(arguments.write).write_text(page(rows))


if __name__ == "__main__":
    main()
