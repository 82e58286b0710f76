"""The plan: its arithmetic by hand, what it refuses, and a calibration on the tiny encoder."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ckd_ray.checks import load_config
from ckd_ray.config import Config
from ckd_ray.embed.stream import plan_shards
from ckd_ray.errors import UserError
from ckd_ray.files import join, make_folder, write_atomic
from ckd_ray.jobs.prices import hourly
from ckd_ray.plan import estimate as e
from ckd_ray.plan.cluster import Machines, PlannedCluster, accelerator_of, read_cluster, this_machine
from ckd_ray.plan.job import GivenSizes, make_plan, parse_prices
from ckd_ray.plan.layout import lay_out
from ckd_ray.plan.rates import Rates, StepRate, carried_over, for_backbone, load_rates, save_rates
from ckd_ray.plan.search_time import Servers, search_parts, vote_parts
from ckd_ray.plan.show import render
from ckd_ray.plan.sizes import Sizes, count_collection
from ckd_ray.plan.space import encoder_bytes, stage_memory, stage_storage, training_bytes
from tests.support import overrides

MS_MARCO = Sizes(8_841_823, {"train": 502_939, "dev": 6_980}, 510_000, 75.0, 68.0, 335.0, counted=False)
SMALL = Sizes(1000, {"train": 400, "dev": 100, "test": 100}, 600, 100.0, 80.0, 500.0, read_seconds=2.0)


def rates(**changes: object) -> Rates:
    """Two cores of round numbers."""
    values: dict[str, object] = {
        "machine": "round",
        "cores": 2,
        "device": "cpu",
        "accelerator": None,
        "backbone": Config().model.backbone,
        "parameters": 20_000_000,
        "embedding_parameters": 12_000_000,
        "layers": 6,
        "hidden": 384,
        "token_flops": 20e6,
        "precision": "fp32",
        "encode_token_s": 2e-4,
        "tokenize_token_s": 1e-6,
        "write_byte_s": 1e-9,
        "build_passage_s": 1e-4,
        "build_query_s": 2e-5,
        "corpus_share": 0.4,
        "training": {"teacher": StepRate(0.1, 3e-4, 1.25), "distill": StepRate(0.2, 4e-4, 1.25)},
        "checkpoint_s": 1.0,
        "dense_ops": 1e11,
        "pair_ops": 5e10,
        "single_ops": 1e10,
        "pair_exact_ops": 2e10,
        "single_exact_ops": 5e9,
        "nearest_ops": 5e10,
        "nearest_vector_s": 1e-4,
        "assign_ops": 5e10,
        "probe_ops": 2e10,
        "merge_entry_s": 1e-7,
        "rank_row_s": 1e-6,
        "evaluate_row_s": 1e-5,
        "expand_query_s": 1e-3,
        "crowded_query_s": 1e-4,
        "add_token_s": 1e-6,
        "pq_train_s": 4.0,
        "ivf_row_s": 1e-5,
        "ivf_code_s": 1e-9,
        "ivf_probe_s": 1e-6,
        "promising_query_s": 3e-3,
        "list_entry_s": 5e-9,
        "list_passage_s": 1e-9,
        "decode_token_s": 1e-7,
        "process_start_s": 5.0,
    }
    return Rates(**{**values, **changes})  # type: ignore[arg-type]


def machines(
    count: int = 1, cpus: float = 2, gpus: float = 0, kind: str | None = None, **more: object
) -> PlannedCluster:
    return PlannedCluster((Machines("m", count, cpus, 64, gpus, kind, **more),), "test")  # type: ignore[arg-type]


def config(*values: str) -> Config:
    return load_config(None, ["collection.limit=null", "model.doc_maxlen=180", "retrieve.engine=auto", *values])


def seconds(parts: list[e.Part]) -> dict[str, float]:
    return {part.name: part.seconds for part in parts}


def test_collection_by_hand() -> None:
    found = seconds(e.collection_parts(SMALL, rates()))
    # 1,000 passages of 0.1 ms and 600 queries of 0.02 ms, after the 2 s that reading took here.
    assert found == {"read the source": 2.0, "check and write": pytest.approx(0.1 + 0.012)}


def test_embed_on_two_cores_by_hand() -> None:
    c = config("embed.passages_per_shard=100", "embed.precision=fp32")
    layout = lay_out(c, SMALL, machines())
    assert (layout.actors, layout.shards, layout.shard_passages) == (2, 10, 100)
    found = seconds(e.embed_parts(c, SMALL, rates(), layout, ("train", "dev", "test")))
    encode = (1000 * 100 + 600 * 32) * 2e-4  # 23.84 s of a core
    tokenise = 1000 * 100 * 1e-6
    write = (1000 * 80 + 600 * 32) * 256 * 1e-9
    busy = (encode + tokenise + write) / 2
    assert found["encode"] == pytest.approx(busy)
    # Half a shard of ten, which one of two actors is alone with: 0.5 * (2 busy / 10) * (1 - 1 / 2).
    assert found["last shards"] == pytest.approx(0.5 * 2 * busy / 10 / 2)
    assert found["start processes"] == pytest.approx(e.EMBED_START[0] * 5 + e.EMBED_START[1])
    assert found["choose the precision"] == found["write to the storage"] == 0


def test_training_by_hand_and_over_workers() -> None:
    c = config("teacher.steps=100", "teacher.batch_size=20", "teacher.checkpoint_every=30", "teacher.precision=fp32")
    layout = lay_out(c, SMALL, machines())
    found = seconds(e.training_parts(c, c.teacher, SMALL, rates(), layout, "teacher", 1))
    # 20 queries of 32 and 40 passages of 100 tokens, and a quarter of padding: 5,800 tokens.
    assert found["training steps"] == pytest.approx(100 * (0.1 + 5800 * 3e-4))
    assert found["checkpoints"] == pytest.approx(4 * (1.0 + e.REPORT_S))
    # Twice the batch: twice the tokens. One core: half as fast. Two workers of a core each: as one of two, and a ring.
    step = rates().training["teacher"]
    one_core = replace(layout, node_cpus=1.0, cpus=1.0)
    assert e.step_seconds(step, rates(), layout, 12000, 1) == pytest.approx(0.1 + 12000 * 3e-4)
    assert e.step_seconds(step, rates(), one_core, 6000, 1) == pytest.approx(0.1 + 6000 * 6e-4)
    ring = 2 * 0.5 * 4 * 20e6 / e.LOCAL_LINK
    assert e.step_seconds(step, rates(), layout, 6000, 2) == pytest.approx(0.1 + 6000 * 3e-4 + ring)
    apart = replace(layout, node_cpus=1.0, nodes=2, network_bytes=1e8)
    assert e.step_seconds(step, rates(), apart, 6000, 2) == pytest.approx(0.1 + 3000 * 6e-4 + 0.8)


def test_exact_search_by_hand() -> None:
    c = config()
    layout = lay_out(c, SMALL, machines())
    servers = Servers("exact", 2, 1)
    found = seconds(search_parts(c, SMALL, rates(), layout, servers, 400, 100))
    pair = 80 * 2 * 32 * 128
    assert found["score all passages"] == pytest.approx(400 * 1000 * pair / 1e11 / 2)
    # Each of two servers scores the best 100 of its 500 once more; 256 * 100 / 500 queries want each: by passage.
    assert found["exact scores of the best"] == pytest.approx(400 * 100 * pair / 2e10)
    assert found["merge the lists"] == pytest.approx(400 * 100 * 1e-7 / 2)
    # 256 * 100 / 6,000 is still more than three.
    found = seconds(search_parts(c, replace(SMALL, passages=12_000), rates(), layout, servers, 400, 100))
    assert found["exact scores of the best"] == pytest.approx(400 * 100 * pair / 2e10)
    # In a large corpus hardly two queries want the same passage: the rate of single pairs.
    large = replace(SMALL, passages=1_000_000)
    found = seconds(search_parts(c, large, rates(), layout, servers, 400, 100))
    assert found["exact scores of the best"] == pytest.approx(400 * 100 * pair / 5e9)


def test_faiss_and_its_votes_by_hand() -> None:
    c = config("retrieve.engine=faiss", "retrieve.cells=1024", "label.neighbours=faiss")
    sizes = replace(SMALL, passages=20_000)  # 1.6 million embeddings
    layout = lay_out(c, sizes, machines())
    assert (layout.retrieve.count, layout.retrieve.threads) == (1, 2)
    found = seconds(search_parts(c, sizes, rates(), layout, layout.retrieve, 400, 100))
    assign = (10 * 65_536 + 1.6e6) * 1024 * 256 / 5e10
    assert found["build the index"] == pytest.approx((assign + 1.6e6 * 1e-6 + 4.0) / 2)
    row = 1e-5 + 1024 * 256 / 5e10 + 32 * (1e-6 + 1.6e6 / 1024 * 1e-9)
    assert found["look into the cells"] == pytest.approx(400 * 32 * row / 2)
    assert found["choose candidates"] == pytest.approx(400 * 3e-3)
    votes = seconds(vote_parts(c, sizes, rates(), layout, 400))
    assert votes["votes by the index"] == pytest.approx(400 * 24 * row / 2)


def test_votes_and_centroids_by_hand() -> None:
    c = config("retrieve.engine=centroids", "embed.codec=residual2", "label.neighbours=exact")
    layout = lay_out(c, SMALL, machines())
    votes = seconds(vote_parts(c, SMALL, rates(), layout, 400))
    # Two servers look at half of the rows each, and both make sure of their ten nearest.
    assert votes["exact votes of the collection"] == pytest.approx(400 * 24 * (80_000 * 256 / 5e10 / 2 + 1e-4))
    found = seconds(search_parts(c, SMALL, rates(), layout, layout.retrieve, 400, 100))
    known = 1024  # the power of two below min(8 sqrt(80,000), 80,000 / 40)
    assert found["look at centroids"] == pytest.approx(400 * 32 * known * 256 / 2e10 / 2)
    entries = 400 * 32 * 32 * 80_000 / known * 5e-9 + 400 * 1000 * 1e-9
    assert found["read the lists"] == pytest.approx(entries / 2)
    estimated = replace(layout, votes="estimate")
    cells = seconds(vote_parts(c, SMALL, rates(), estimated, 400))["find the special tokens' cells"]
    # 80,000 rows make 1,250 cells; 4 rounds over 32 rows a cell, then all rows once.
    assert cells == pytest.approx((4 * 40_000 + 80_000) * 1250 * 256 / 5e10 / 2)


def test_the_driver_does_not_shrink() -> None:
    """Amdahl: with more machines the scaling parts shrink by their number, the rest stays."""
    c = config("evaluate.engine=exact", "embed.precision=fp32")
    sizes = replace(SMALL, passages=100_000)
    one, ten = (e.estimate(c, sizes, rates(), lay_out(c, sizes, machines(n, 4, network_gbit=10))) for n in (1, 10))
    evaluate = {p.name: p.seconds for p in one.stages[-1].parts}
    many = {p.name: p.seconds for p in ten.stages[-1].parts}
    assert many["run files and measures"] == evaluate["run files and measures"] == pytest.approx(2 * 200 * 1000 * 1e-5)
    assert many["score all passages (student)"] == pytest.approx(evaluate["score all passages (student)"] / 10)
    assert many["exact scores of the best (teacher)"] == pytest.approx(evaluate["exact scores of the best (teacher)"])
    assert many["encode"] == pytest.approx(evaluate["encode"] / 10)
    assert many["encode (encoder as it is)"] == pytest.approx(evaluate["encode (encoder as it is)"] / 10)
    assert many["BM25"] == evaluate["BM25"] == pytest.approx(100_000 * (SMALL.tokens * 1e-6 + 200 * 1.5e-8))
    assert many["run files and measures (baselines)"] == pytest.approx(2 * 200 * 1000 * 1e-5)
    fewer = config("evaluate.baselines=[encoder, bm25]", "evaluate.bm25_passages=99999")
    names = [p.name for p in e.estimate(fewer, sizes, rates(), lay_out(fewer, sizes, machines(1, 4))).stages[-1].parts]
    assert "BM25" not in names and "encode (encoder as it is)" in names
    assert ten.seconds > one.serial_seconds * 0.9
    assert one.bound.name == "embed" or one.bound.name == "evaluate"


def test_ms_marco_on_eight_gpus() -> None:
    """Sizes of the paper: the store of 8.8 million passages of 68 tokens is 156 GB in fp16, and a sixth of it coded."""
    cluster = machines(2, 48, 4, "A10G", network_gbit=40.0)
    for codec, each in (("fp16", 256), ("residual2", 36)):
        c = config(f"embed.codec={codec}", "run.storage=s3://bucket/run", "teacher.workers=4", "distill.workers=4")
        layout = lay_out(c, MS_MARCO, cluster)
        carried = carried_over(rates(), "A10G")
        plan = e.estimate(c, MS_MARCO, carried, layout)
        embed = plan.stages[2]
        # Token ids, lengths and document frequencies are 4 bytes a token and little more.
        assert embed.storage["embeddings/passages"] == pytest.approx(8_841_823 * 68 * (each + 4), rel=0.02)
        assert layout.retrieve.engine == ("faiss" if codec == "fp16" else "centroids")
        assert layout.votes == "estimate" and layout.actors == 8 and layout.distill_workers == 4
        # 20 MFLOP a token at 30 % of 70 TFLOP/s and 8 GPUs: 79 s for 663 million tokens; writing goes on top.
        tokens = 8_841_823 * 75 + 509_919 * 32
        assert carried.encode_token_s == pytest.approx(20e6 / 21e12)
        encode = seconds(list(embed.parts))["encode"]
        assert encode > tokens * 20e6 / 21e12 / 8
        labels = plan.stages[4].storage["labels"]
        assert labels == pytest.approx(502_939 * 24 * (129 * 4 + 0.95 * 512))
        # 4 workers: weights and moments, and a quarter of a batch's activations.
        tokens = c.distill.batch_size * (32 + (1 + c.distill.negatives) * 75) * 1.25 / 4
        step = training_bytes(tokens, carried, on_gpu=True)
        assert plan.stages[5].memory["gpu"] == pytest.approx(0.7 * 2**30 + step)
        assert 600 < plan.seconds < 30 * 86400
        assert any("A10G" in text for text in carried.assumptions)


def test_a_hundred_gpus_and_140_million_passages() -> None:
    c = config("embed.codec=residual2", "run.storage=s3://bucket/run", "retrieve.engine=centroids")
    sizes = replace(MS_MARCO, passages=140_000_000)
    cluster = machines(25, 48, 4, "A10G", network_gbit=40.0)
    layout = lay_out(c, sizes, cluster)
    plan = e.estimate(c, sizes, carried_over(rates(), "A10G"), layout)
    few = e.estimate(c, sizes, carried_over(rates(), "A10G"), lay_out(c, sizes, machines(2, 48, 4, "A10G")))
    assert layout.actors == 100 and layout.shards == len(plan_shards(140_000_000, "auto"))
    assert plan.stages[2].storage["embeddings/passages"] == pytest.approx(140e6 * 68 * 40, rel=0.02)  # 381 GB
    assert seconds(list(plan.stages[2].parts))["encode"] == pytest.approx(
        seconds(list(few.stages[2].parts))["encode"] * 8 / 100
    )
    # The driver's memory is bounded by ids and labels: 12 bytes a passage.
    assert plan.stages[2].memory["driver"] < 4 * 2**30
    # faiss would be one server with 28 bytes a token embedding: 267 GB, which it says.
    layout = lay_out(config("retrieve.engine=faiss"), sizes, cluster)
    assert layout.retrieve.index_bytes == pytest.approx(28 * 140e6 * 68, rel=0.01)


def test_memory_and_storage_by_hand() -> None:
    c = config("embed.passages_per_shard=100", "distill.batch_size=20")
    layout = lay_out(c, SMALL, machines())
    # 16 bytes a parameter; 6,000 tokens keep 34 * 384 numbers a layer, 4 bytes each of which 2 are counted in the 34.
    assert training_bytes(6000, rates(), on_gpu=False) == 16 * 20e6 + 6000 * 6 * 68 * 384
    assert training_bytes(1500, rates(), on_gpu=True) == 16 * 20e6 + 1500 * 6 * 34 * 384
    process, device = encoder_bytes(c, SMALL, rates(), layout)
    shard = 100 * 80 * (256 + 256 + 8)
    assert device == 0 and process == pytest.approx(0.45 * 2**30 + shard + 160e6 + 1440 * 384 * 80)
    assert stage_storage("retrieve", c, SMALL, rates(), layout)["rankings"] == 400 * 100 * 13
    assert stage_storage("distill", c, SMALL, rates(), layout)["student"] == 81e6
    memory = stage_memory("collection", c, SMALL, rates(), layout)
    assert memory == {"driver": pytest.approx(0.55 * 2**30 + 8000 + 400 * 600 + 250 * 600)}


def test_rates_of_other_hardware_are_assumptions() -> None:
    measured = replace(rates(), device="cuda", accelerator="A100", precision="bf16")
    same = carried_over(measured, "A100")
    assert same == measured and not same.assumptions
    slower = carried_over(measured, "T4")
    assert slower.encode_token_s == pytest.approx(2e-4 * 312 / 65)
    assert slower.training["distill"].token_s == pytest.approx(4e-4 * 312 / 65)
    assert slower.dense_ops == pytest.approx(1e11 * 65 / 312) and len(slower.assumptions) == 1
    base = for_backbone(rates(), "google-bert/bert-base-uncased", 100.0)
    flops = 2 * (109_482_240 - 23_837_184) + 4 * 100 * 768 * 12
    assert base.encode_token_s == pytest.approx(2e-4 * flops / 20e6) and base.parameters == 109_482_240
    assert for_backbone(rates(), "somebody/unknown", 100.0) == rates()
    with pytest.raises(UserError, match="the cluster has none"):
        carried_over(measured, None)
    with pytest.raises(UserError, match="a GPU that is not known here"):
        carried_over(rates(), "Z9000")


AWS = """
provider: {type: aws}
max_workers: 3
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}, node_config: {InstanceType: m5.xlarge}}
  gpu:
    max_workers: 8
    resources: {}
    node_config: {InstanceType: g5.12xlarge, InstanceMarketOptions: {MarketType: spot}}
"""


def test_cluster_files(tmp_path: Path) -> None:
    def read(text: str, **prices: float) -> PlannedCluster:
        (tmp_path / "c.yaml").write_text(text)
        return read_cluster(str(tmp_path / "c.yaml"), prices)

    aws = read(AWS)
    head, gpu = aws.groups
    assert (head.cpus, head.spot, head.usd) == (0, False, hourly("m5.xlarge", spot=False))
    assert (gpu.count, gpu.cpus, gpu.gpus, gpu.accelerator, gpu.spot) == (3, 48, 4, "A10G", True)
    assert aws.gpus == 12 and len(aws.nodes) == 3
    spot = hourly("g5.12xlarge", spot=True)
    assert spot is not None and head.usd is not None and aws.usd == pytest.approx(head.usd + 3 * spot)
    assert read(AWS, **{"g5.12xlarge": 2.0}).groups[1].usd == 2.0
    gcp = AWS.replace("InstanceType: m5.xlarge", "machineType: n2-standard-8")
    attached = (
        "machineType: zones/z/machineTypes/n1-standard-8, scheduling: [{provisioningModel: SPOT}], "
        "guestAccelerators: [{acceleratorType: zones/z/acceleratorTypes/nvidia-tesla-t4, acceleratorCount: 2}]"
    )
    gcp = gcp.replace("InstanceType: g5.12xlarge, InstanceMarketOptions: {MarketType: spot}", attached)
    workers = read(gcp).groups[1]
    assert (workers.name, workers.gpus, workers.accelerator, workers.spot) == ("n1-standard-8", 2, "T4", True)
    plain = read("nodes: [{count: 4, cpus: 16, gpus: 1, accelerator: H100, memory_gib: 128, usd_per_hour: 2.5}]")
    assert (plain.cpus, plain.gpus, plain.accelerator, plain.usd) == (64, 4, "H100", 10.0)
    pod = "{containers: [{resources: {limits: {cpu: %s, memory: %s%s}}}]}"
    kube = read(
        "kind: Secret\n---\nkind: RayCluster\nspec:\n"
        f"  headGroupSpec: {{rayStartParams: {{num-cpus: '0'}}, template: {{spec: {pod % ('2', '8Gi', '')}}}}}\n"
        "  workerGroupSpecs: [{groupName: gpu, replicas: 5, template: {spec: {nodeSelector: {gpu-kind: nvidia-l4}, "
        + (pod % ("7500m", "32Gi", ", nvidia.com/gpu: 1"))[1:]
        + "}}]\n"
    )
    assert [(m.count, m.cpus, m.gpus, m.accelerator) for m in kube.groups] == [(1, 0, 0, None), (5, 7.5, 1, "L4")]
    assert kube.usd is None and kube.groups[1].memory_gib == 32
    local = read("provider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.3]}")
    assert len(local.nodes) == 3 and local.cpus == 3 * this_machine().cpus
    with pytest.raises(UserError, match="an instance type that is not known") as refused:
        read(AWS.replace("g5.12xlarge", "g5.13xlarge"))
    assert "g5.12xlarge" in str(refused.value)
    own = read(AWS.replace("g5.12xlarge", "x9.huge").replace("resources: {}", "resources: {CPU: 8, GPU: 2}"))
    assert own.groups[1].gpus == 2 and own.usd is None
    for text in (
        "[1, 2]",
        "nodes: [{cpu: 3}]",
        "{a: 1}",
        "nodes: [{gpus: 1}]",
        "nodes: []",
        "nodes: [{cpus: 0}]",
        ": {",
    ):
        with pytest.raises(UserError):
            read(text)
    assert accelerator_of("NVIDIA A100-SXM4-80GB") == "A100-80GB"
    assert accelerator_of("NVIDIA H100 80GB HBM3") == "H100" and accelerator_of("Tesla T4") == "T4"


def test_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckd_ray.plan.job._encoder", lambda config: pytest.fail("measured before it was refused"))
    given = GivenSizes(1000, 100, 80.0)
    file = tmp_path / "rates.json"
    with pytest.raises(UserError, match="sizes come together"):
        make_plan(config(), given=GivenSizes(passages=5))
    with pytest.raises(UserError, match="sizes come together"):
        make_plan(config(), given=GivenSizes(evaluated=5))
    with pytest.raises(UserError, match="--eval-queries"):
        make_plan(config(), given=replace(given, evaluated=-5))
    with pytest.raises(UserError, match="longer than the encoder reads"):
        make_plan(config(), given=GivenSizes(1000, 100, 500.0))
    with pytest.raises(UserError, match="must be positive"):
        make_plan(config(), given=GivenSizes(0, 100, 50.0))
    with pytest.raises(UserError, match="does not fit the cluster"):  # GPUs are asked for and there are none
        make_plan(config("embed.gpus_per_actor=1"), given=given, cluster=None)
    with pytest.raises(UserError, match="training workers do not fit"):
        make_plan(config("distill.workers=30", "distill.batch_size=30"), given=given)
    for text in ("{", "[]", '{"format": 0}', json.dumps({**rates().to_dict(), "dense_ops": -1})):
        file.write_text(text)
        with pytest.raises(UserError):
            make_plan(config(), given=given, rates=str(file))
    broken = rates().to_dict()
    del broken["training"]["distill"]
    file.write_text(json.dumps(broken))
    with pytest.raises(UserError, match="rates are missing"):
        load_rates(str(file))
    monkeypatch.setattr("ckd_ray.plan.job.count_collection", lambda *a, **k: pytest.fail("counted before"))
    save_rates(replace(rates(), device="cuda", accelerator="T4"), str(file))
    with pytest.raises(UserError, match="the cluster has none"):
        make_plan(config(), rates=str(file))
    for wrong in ("g5.xlarge", "=1", "a=b", "a=-1"):
        with pytest.raises(UserError, match="not a price"):
            parse_prices([wrong])
    assert parse_prices(["g5.xlarge=0.5"]) == {"g5.xlarge": 0.5}


def test_rates_file_there_and_back(tmp_path: Path) -> None:
    path = str(tmp_path / "rates.json")
    save_rates(rates(), path)
    assert load_rates(path) == rates()
    with pytest.raises(UserError, match="cannot be written"):
        save_rates(rates(), str(tmp_path / "no" / "rates.json"))


def test_count_is_that_of_the_collection_stage(tiny_collection: str, tmp_path: Path) -> None:
    """With and without a limit, the numbers are those that building the collection gives."""
    from ckd_ray.data import build_collection

    for limit in ("null", "30"):
        c = load_config(None, overrides(tmp_path, "x", tiny_collection, f"collection.limit={limit}"))
        sizes, sample = count_collection(c.collection, passages=20, queries=8)
        built = build_collection(c.collection, str(tmp_path / f"run-{limit}"))
        assert sizes.passages == built.num_passages
        assert sizes.queries == {split: counts["queries"] for split, counts in built.splits.items()}
        assert sizes.labels == sum(counts["labels"] for counts in built.splits.values())
        assert len(sample.labels) == 8 and len(sample.passages) >= 20
        here = {name for name, _ in sample.passages}
        labelled = {passage for _, passage in sample.labels}
        assert labelled <= here and here - labelled - {f"p{i}" for i in range(20)}  # not the first ones only


def test_count_from_an_object_store(tiny_collection: str, tmp_path: Path) -> None:
    """A collection on `s3://` is streamed from there, with the same numbers and the same sample."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        uri = f"s3://key:secret@plan/c?scheme=http&endpoint_override={host}:{port}&allow_bucket_creation=true"
        make_folder(uri)
        for file in Path(tiny_collection).iterdir():
            data = file.read_bytes()
            write_atomic(join(uri, file.name), lambda stream, data=data: stream.write(data))  # type: ignore[misc]
        found = []
        for path in (tiny_collection, uri):
            c = load_config(None, overrides(tmp_path, "x", tiny_collection, f"collection.path={path}"))
            found.append(count_collection(c.collection, passages=20, queries=8))
    finally:
        server.stop()
    (here, sample), (there, remote) = found
    assert remote == sample and replace(there, read_seconds=here.read_seconds) == here


def test_plan_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with given rates and sizes: one object on standard output, costs that add up, a table for people."""
    from ckd_ray.cli import app

    (tmp_path / "c.yaml").write_text(AWS)
    save_rates(rates(), str(tmp_path / "rates.json"))
    options = ["plan", "--cluster", str(tmp_path / "c.yaml"), "--rates", str(tmp_path / "rates.json"), "--passages"]
    options += ["8841823", "--queries", "502939", "--tokens-per-passage", "75", "--set", "model.doc_maxlen=180"]
    options += ["--eval-queries", "6980"]
    options += ["--price", "g5.12xlarge=2", "--set", "run.storage=s3://b/r"]
    app([*options, "--json"], standalone_mode=False)
    out = json.loads(capsys.readouterr().out)
    names = [stage["stage"] for stage in out["stages"]]
    assert names == ["collection", "teacher", "embed", "retrieve", "label", "distill", "evaluate"]
    assert out["seconds"] == pytest.approx(sum(stage["seconds"] for stage in out["stages"]), abs=1)
    hour = hourly("m5.xlarge", spot=False)
    assert hour is not None and out["cluster"]["usd_per_hour"] == pytest.approx(hour + 6)
    assert out["cost_usd"] == pytest.approx((hour + 6) * out["seconds"] / 3600, rel=0.01)
    assert out["cost_usd"] == pytest.approx(sum(stage["cost_usd"] for stage in out["stages"]), abs=0.1)
    longest = max(out["stages"], key=lambda stage: stage["seconds"])
    assert out["bound"]["stage"] == longest["stage"] and longest["bound"] == out["bound"]["waits_for"]
    assert out["storage_bytes"] == pytest.approx(sum(sum(s["storage_bytes"].values()) for s in out["stages"]), abs=50)
    assert set(out["memory_bytes"]) == {"driver", "actor", "gpu"} and out["assumptions"]
    assert out["warnings"] == [] and out["collection"]["queries"] == {"train": 502939, "dev": 6980, "test": 6980}
    save_rates(rates(load=3.0, backbone="other"), str(tmp_path / "rates.json"))
    large = ["--set", "distill.batch_size=20000", "--set", "run.storage=runs"]
    app([*options, *large], standalone_mode=False)
    said = capsys.readouterr()
    for warning in ("the rates are of other", "the machine was busy", "distill: ", "run.storage is a local"):
        assert f"warning: {warning}" in said.err
    assert said.out == "" and "evaluate" in said.err and "assumed: no A10G was measured" in said.err


def test_calibration_on_the_tiny_encoder(
    tiny_backbone: str, tiny_collection: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is measured by the stages' own code, without Ray; rates are kept and read again."""
    import ray
    import torch

    # One thread: where other tests run beside this one, two wait for each other most of the time.
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("ckd_ray.plan.measure._BUILT_ROWS", 200)
    monkeypatch.setattr("ckd_ray.plan.measure._process_start", lambda: 3.0)
    started = ray.is_initialized()
    c = load_config(None, overrides(tmp_path, tiny_backbone, tiny_collection))
    kept = tmp_path / "rates.json"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        planned = make_plan(c, keep=str(kept))
    finally:
        torch.set_num_threads(threads)
    assert ray.is_initialized() == started and not (tmp_path / "tiny").exists()
    assert planned.rates == load_rates(str(kept)) and planned.rates.process_start_s == 3.0
    assert planned.sizes.passages == 60 and 20 < planned.sizes.kept <= planned.sizes.tokens <= 48
    assert planned.rates.layers == 2 and planned.rates.hidden == 32
    step = planned.rates.training["distill"]
    assert 1 <= step.padding < 2
    assert [stage.name for stage in planned.plan.stages][-1] == "evaluate"
    assert "tokens" in render(planned)
    again = make_plan(c, rates=str(kept), given=GivenSizes(60, 24, planned.sizes.tokens))
    assert again.plan.stages[1].seconds == pytest.approx(planned.plan.stages[1].seconds)
    json.dumps(planned.to_dict())


def test_estimates_need_no_ray() -> None:
    import subprocess

    code = "import sys, ckd_ray.plan.estimate, ckd_ray.plan.rates; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
