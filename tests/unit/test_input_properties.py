"""Whatever bytes come in: a message, or everything that was read is there or counted."""

from __future__ import annotations

import json
import re
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from ckd_ray.checks import load_config
from ckd_ray.config import Config
from ckd_ray.cross_encoder.score_rows import read_scores
from ckd_ray.data import Collection, build_collection
from ckd_ray.data.problems import Problems
from ckd_ray.data.sources import Source, open_source
from ckd_ray.errors import JobError, UserError
from ckd_ray.evaluate.runs import read_trec_run, write_trec_run
from ckd_ray.progress import printable, without_secrets
from ckd_ray.store import BrokenShardError, Shard

few = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
# Everything that UTF-8 holds; a line of TSV has no line ends in it, an id neither tabs nor NUL nor a byte-order mark.
text = st.text(st.characters(codec="utf-8"), max_size=40)
line = text.map(lambda t: re.sub(r"[\n\r]", " ", t))
ids = line.map(lambda t: re.sub("[\t\x00\ufeff]", " ", t)).filter(str.strip)
columns = st.lists(line, max_size=6).map("\t".join)
junk = st.one_of(st.binary(max_size=200), text.map(str.encode), columns.map(str.encode))
keys = st.sampled_from(["_id", "text", "title", "x"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=6,
)
FILES = {
    "msmarco": ("collection.tsv", "queries.train.tsv", "qrels.train.tsv"),
    "beir": ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"),
}


def collection(folder: Path, kind: str) -> Source:
    return open_source(load_config(None, [f"collection.format={kind}", f"collection.path={folder}"]).collection)


def build(folder: Path, kind: str) -> Collection | None:
    """The collection in `folder`, or None when it was refused with a message."""
    config = load_config(None, [f"collection.format={kind}", f"collection.path={folder}"])
    try:
        build_collection(config.collection, str(folder / "out"))
    except UserError as error:
        assert 10 < len(str(error)) < 8000 and printable(str(error))
        return None
    return Collection.open(str(folder / "out"))


@few
@given(st.lists(st.tuples(ids, line), min_size=1, max_size=12, unique_by=lambda p: p[0]), st.data())
def test_what_is_sound_comes_back_whole(passages: list[tuple[str, str]], data: st.DataObject) -> None:
    names = [name for name, _ in passages]
    grades = st.integers(-(2**31), 2**31 - 1)
    labels = data.draw(st.dictionaries(st.sampled_from(names), grades, max_size=6)) | {names[0]: 1}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "collection.tsv").write_bytes("".join(f"{n}\t{t}\n" for n, t in passages).encode())
        asked = f"{passages[0][1]} x"  # a labelled query without text is refused
        (folder / "queries.train.tsv").write_bytes(f"q {names[0]}\t{asked}\n".encode())
        rows = [f"q {names[0]}\t0\t{name}\t{grade}\n" for name, grade in labels.items()]
        (folder / "qrels.train.tsv").write_bytes("".join(rows + rows[:1]).encode())
        found = build(folder, "msmarco")
        assert found is not None and found.num_passages == len(names)
        assert found.passage_ids(range(len(names))) == names
        assert found.texts(range(len(names))) == [t for _, t in passages]
        split, qrels = found.manifest["splits"]["train"], found.qrels("train")
        assert split["labels"] + split["repeated_labels"] == len(rows) + 1
        assert dict(zip(qrels.passage_ids, qrels.relevance.tolist(), strict=True)) == labels
        assert found.queries("train").texts == [asked]


@few
@given(st.lists(junk, min_size=3, max_size=3), st.sampled_from(["msmarco", "beir"]))
def test_junk_is_refused_or_counted(files: list[bytes], kind: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "qrels").mkdir()
        for name, content in zip(FILES[kind], files, strict=True):
            (folder / name).write_bytes(content)
        found = build(folder, kind)
        assert found is None or found.num_passages == files[0].removesuffix(b"\n").count(b"\n") + 1


@few
@given(st.lists(values, min_size=1, max_size=8))
def test_json_of_any_shape(rows: list[object]) -> None:
    """Every line gives a row or a problem, never both, never neither."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "qrels").mkdir()
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "queries.jsonl").write_text('{"_id": "q", "text": "a"}\n')
        (folder / "qrels" / "train.tsv").write_text("q\t0\tp\t1\n")
        problems = Problems(most=None)
        read = list(collection(folder, "beir").passages(problems))
        assert len(read) + len(problems.lines) == len(rows)


@few
@given(st.lists(st.one_of(values.map(json.dumps), line), max_size=8), st.sampled_from(["x.tsv", "x.jsonl"]))
def test_scores_of_any_shape(rows: list[str], name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        path.write_bytes("".join(row + "\n" for row in rows).encode())
        problems = Problems(most=None)
        blocks = list(read_scores(str(path), problems))
        scores = np.concatenate([block.scores for block in blocks])
        assert np.isfinite(scores).all()
        spoken_of = {int(n) for block in blocks for n in block.lines} | {int(p.split(":")[1]) for p in problems.lines}
        silent = {i for i, row in enumerate(rows, 1) if not row.strip()}
        if name == "x.jsonl":  # a row of a query without any pair holds nothing
            silent |= {i for i, row in enumerate(rows, 1) if _lonely(row)}
        assert spoken_of | silent >= set(range(1, len(rows) + 1)) and not spoken_of - set(range(1, len(rows) + 1))


def _lonely(row: str) -> bool:
    try:
        value = json.loads(row)
    except ValueError:
        return False
    return isinstance(value, list) and len(value) == 1


@few
@given(st.one_of(text, st.dictionaries(st.sampled_from(list(Config.model_fields)), values, max_size=3).map(json.dumps)))
def test_a_configuration_of_any_shape(content: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "c.yaml"
        path.write_bytes(content.encode())
        try:
            assert isinstance(load_config(str(path)), Config)
        except UserError as error:
            assert len(str(error)) < 8000


@few
@given(st.lists(st.tuples(text.filter(str.strip), text.filter(str.strip)), min_size=1, max_size=6), text)
def test_a_run_of_any_ids_comes_back(pairs: list[tuple[str, str]], noise: str) -> None:
    frame = pd.DataFrame(pairs, columns=["query_id", "doc_id"]).assign(rank=range(1, len(pairs) + 1), score=0.5)
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "x.run")
        write_trec_run(path, [frame], "tag")
        back = read_trec_run(path)
        assert len(back) == len(pairs)
        assert all(len(name.split()) == 1 for name in [*back["query_id"], *back["doc_id"]])
        Path(path).write_bytes(noise.encode())
        with suppress(UserError):
            assert len(read_trec_run(path)) in (0, noise.removesuffix("\n").count("\n") + 1)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from ckd_ray.store import write_shard
    from ckd_ray.store.codec import Float16

    path = tmp_path_factory.mktemp("shard") / "shard-000000.arrow"
    rows, lengths = torch.randn(30, 8), np.array([10, 0, 20], np.int32)
    write_shard(
        str(path), fingerprint="f", index=0, first=0, lengths=lengths, token_ids=np.arange(30, dtype=np.int32),
        embeddings_TD=rows, codec=Float16(8),
    )  # fmt: skip
    return path


@settings(few, max_examples=150)
@given(st.data())
def test_no_changed_byte_of_a_shard_goes_unseen(shard: Path, data: st.DataObject) -> None:
    """One byte changed anywhere: it is found, or it carried nothing (padding) and all values are as they were."""
    whole = shard.read_bytes()
    sound = Shard(str(shard))
    at, other = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    changed = shard.with_name("changed.arrow")
    changed.write_bytes(whole[:at] + bytes([whole[at] ^ other]) + whole[at + 1 :])
    try:
        found = Shard(str(changed))
        found.verify()
    except BrokenShardError:
        return
    assert found.header == sound.header and np.array_equal(found.codes, sound.codes)
    assert np.array_equal(found.token_ids, sound.token_ids) and np.array_equal(found.lengths, sound.lengths)


@few
@given(text)
def test_no_text_breaks_a_message(anything: str) -> None:
    shown = printable(anything)
    assert len(shown) <= len(anything) + 20 and printable(shown) == shown
    assert without_secrets(without_secrets(anything)) == without_secrets(anything)
    assert anything in str(UserError("x", where=anything)) and str(JobError(anything)) == anything
