"""A whole run on residual codes, in which later stages meet broken files of the store: named, these alone remade."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ckd_ray.checks import load_config
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.pipeline.runner import StageReport, run_stages
from ckd_ray.store import EmbeddingStore, Shard, shard_name
from ckd_ray.store.codec import CODEC_FILE
from tests.fault.stand_in import contents, identity
from tests.support import overrides


def flip_passages(path: Path, passages: list[int]) -> None:
    """One bit of each of these passages (numbers within the shard)."""
    shard, data = Shard(str(path)), bytearray(path.read_bytes())
    start = data.index(shard.codes.tobytes())
    for passage in passages:
        data[start + int(shard.offsets[passage]) * shard.codes.shape[1] + 9] ^= 16
    path.write_bytes(data)


@pytest.mark.soak
@pytest.mark.usefixtures("ray_session")
def test_a_run_on_residual_codes_heals_at_every_stage(
    tmp_path: Path, tiny_backbone: str, tiny_collection: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)
    ColBERT.from_backbone(tiny_backbone, settings, seed=1).save(tmp_path / "given")
    fixed = [f"teacher.checkpoint={tmp_path / 'given'}", "label.token_vote=feedback", "distill.max_failures=0"]
    store, told = tmp_path / "tiny" / "embeddings" / "passages", ""

    def run(*more: str, until: str, start: str | None = None, codec: str = "residual2") -> dict[str, StageReport]:
        nonlocal told
        values = overrides(tmp_path, tiny_backbone, tiny_collection, *fixed, f"embed.codec={codec}", *more)
        reports = run_stages(load_config(None, values), until=until, start=start)
        told = capsys.readouterr().err
        return {report.name: report for report in reports}

    def rankings() -> pa.Table:
        return pa.concat_tables([pq.read_table(p) for p in sorted(store.parents[1].glob("rankings/train-*.parquet"))])

    run(until="embed")
    whole, before = contents(store), identity(store)

    def healed(*broken: str) -> None:
        """The broken files are as they were, and no other shard was touched."""
        now = contents(store)
        assert now == whole
        kept = {name: identity(store)[name] == before[name] for name in before}
        assert kept == {name: name not in broken for name in before}
        assert all(f"{store / name}: missing, or its bytes do not match" in told for name in broken)
        before.update(identity(store))

    (store / CODEC_FILE).write_bytes(whole[CODEC_FILE][:-1] + bytes([whole[CODEC_FILE][-1] ^ 1]))
    run(until="retrieve")
    assert f"{store / CODEC_FILE}: missing, or its bytes do not match" in told
    healed()
    opened = EmbeddingStore.open(str(store))
    assert opened.codec.name == "residual2" and opened.shard(0).codes.shape[1] == 4 + 16 // 4
    ranked = rankings()

    flip_passages(store / shard_name(2), [5])
    run(until="retrieve", start="retrieve")
    healed(shard_name(2))
    assert rankings().equals(ranked)

    top = int(ranked["passage_index"].to_numpy()[ranked["rank"].to_numpy() == 1][0])
    flip_passages(store / shard_name(top // 16), [top % 16])
    run(until="label")
    healed(shard_name(top // 16))

    flip_passages(store / shard_name(1), list(range(16)))
    reports = run(until="evaluate")
    healed(shard_name(1))
    worked = [name for name, report in reports.items() if not report.skipped]
    assert worked == ["embed", "ensemble", "distill", "evaluate"]
    student = EmbeddingStore.open(str(store.parents[1] / "student_embeddings" / "passages"))
    assert student.codec.name == "residual2" and student.num_passages == 60
    assert np.isfinite(EmbeddingStore.open(str(store)).gather(np.arange(60)).embeddings_TD.numpy()).all()

    reports = run(until="retrieve", codec="residual4")
    assert [name for name, report in reports.items() if not report.skipped] == ["embed", "retrieve"]
    assert EmbeddingStore.open(str(store)).shard(0).codes.shape[1] == 4 + 16 // 2
