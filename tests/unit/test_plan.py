"""The plan: fit and layout against values by hand, what it refuses, and a calibration on the tiny encoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ckd_ray.checks import load_config
from ckd_ray.config import Config
from ckd_ray.embed.stream import plan_shards
from ckd_ray.errors import UserError
from ckd_ray.files import join, make_folder, write_atomic
from ckd_ray.jobs.prices import parse_prices
from ckd_ray.plan import estimate as e
from ckd_ray.plan.calibrate import SampleSizes, sample_config, sample_sizes, write_sample
from ckd_ray.plan.cluster import Machines, PlannedCluster, Prices, this_machine
from ckd_ray.plan.cluster_file import read_cluster
from ckd_ray.plan.fit import Observation, fit
from ckd_ray.plan.hardware import Shape, accelerator_of, instances
from ckd_ray.plan.job import make_plan
from ckd_ray.plan.layout import lay_out
from ckd_ray.plan.memory import encoder_bytes, stage_memory, training_bytes
from ckd_ray.plan.rates import (
    Rates,
    load_rates,
    parse_assumptions,
    save_rates,
)
from ckd_ray.plan.show import render
from ckd_ray.plan.sizes import GivenSizes, Sample, Sizes, count_collection
from ckd_ray.plan.transfer import for_backbone, on_accelerator
from ckd_ray.plan.work import stage_work, storage_units
from tests.support import overrides

MS_MARCO = Sizes(8_841_823, {"train": 502_939, "dev": 6_980}, 510_000, 75.0, 68.0, counted=False)
SMALL = Sizes(1000, {"train": 400, "dev": 100, "test": 100}, 600, 100.0, 80.0, read_seconds=2.0)
STAGES = ("collection", "teacher", "embed", "retrieve", "label", "ensemble", "distill", "evaluate")
ASSUMED = parse_assumptions([])


def rates(**changes: object) -> Rates:
    """Two cores of round numbers."""
    costs = {f"{stage} start": 5.0 for stage in STAGES}
    costs |= {"text": 1e-4, "teacher token": 3e-4, "distill token": 4e-4, "step": 0.0, "token": 1e-4, "query": 1e-3}
    costs |= {"exact product": 1e-9, "exact row": 2e-5, "faiss product": 2e-9, "centroids product": 3e-9}
    costs |= {"vote product": 1e-9, "scored pair": 1e-5, "measured row": 1e-5, "codec product": 1e-9}
    lanes = dict.fromkeys(("cores", "encode", "teacher", "distill", "exact", "faiss", "centroids"), 2.0)
    values: dict[str, object] = {
        "machine": "round",
        "cores": 2,
        "device": "cpu",
        "accelerator": None,
        "backbone": Config().model.backbone,
        "shape": Shape(20_000_000, 12_000_000, 6, 384),
        "dim": 128,
        "tokens": 100.0,
        "costs": costs,
        "lanes": lanes,
        "storage": {"corpus": (100.0, 2.0), "teacher": (81e6, 0.0), "embeddings": (0.0, 260.0), "labels": (0.0, 24e3)},
    }
    return Rates(**{**values, **changes})  # type: ignore[arg-type]


def machines(
    count: int = 1, cpus: float = 2, gpus: float = 0, kind: str | None = None, **more: object
) -> PlannedCluster:
    return PlannedCluster((Machines("m", count, cpus, 64, gpus, kind, **more),), "test")  # type: ignore[arg-type]


def config(*values: str) -> Config:
    plain = ["collection.limit=null", "model.doc_maxlen=180", "retrieve.engine=auto", "label.neighbours=auto"]
    return load_config(None, [*plain, *values])


def parts(stage: str, c: Config, sizes: Sizes, found: Rates, cluster: PlannedCluster) -> dict[str, float]:
    return {p.name: p.seconds for p in e.stage_parts(stage, c, sizes, found, lay_out(c, sizes, cluster), ASSUMED)}


def test_fit_by_hand() -> None:
    """A stage at two sizes: 7 s and 0.5 s a unit. Another shares its unit, and has 3 s and 0.25 s a row of its own."""
    seen = [
        Observation({"embed start": 1, "token": 4}, 9.0),
        Observation({"embed start": 1, "token": 20}, 17.0),
        Observation({"evaluate start": 1, "token": 8, "row": 4}, 8.0),
        Observation({"evaluate start": 1, "token": 40, "row": 12}, 26.0),
    ]
    expected = {"embed start": 7.0, "token": 0.5, "evaluate start": 3.0, "row": 0.25}
    assert fit(seen) == pytest.approx(expected)
    # Three observations of one stage tell two units apart.
    found = fit(
        [Observation({"s": 1, "p": p, "r": r}, 2 + 3e-9 * p + 1e-3 * r) for p, r in ((1e9, 9), (5e9, 9), (5e9, 90))]
    )
    assert found == pytest.approx({"s": 2, "p": 3e-9, "r": 1e-3})
    known = fit([Observation({"s": 1, "bm25": 10.0}, 7.0), Observation({"s": 1, "bm25": 0.0}, 2.0)], {"bm25": 0.5})
    assert known == pytest.approx({"s": 2.0, "bm25": 0.5})


def test_noise_costs_nothing_below_zero() -> None:
    """The larger run was the faster one: nothing is left for the unit, and the fixed part is between the two."""
    found = fit([Observation({"s": 1, "u": 1}, 10.0), Observation({"s": 1, "u": 5}, 9.0)])
    assert found["u"] == 0 and 9 <= found["s"] <= 10
    # Without any fixed part the rate is that of both.
    found = fit([Observation({"s": 1, "u": 10}, 1.0), Observation({"s": 1, "u": 20}, 2.5)])
    assert found["s"] == 0 and 0.1 <= found["u"] <= 0.125


def test_work_by_hand() -> None:
    c = config("embed.precision=fp32", "teacher.steps=100", "teacher.batch_size=20", "evaluate.depth=500")
    layout = lay_out(c, SMALL, machines())
    assert stage_work("collection", c, SMALL, layout) == {"collection start": 1, "text": 1600}
    # 20 queries of 32 and the first 96 tokens of 40 passages, a hundred times.
    teacher = {"teacher start": 1, "teacher token": 100 * (20 * 32 + 40 * 96), "step": 100}
    assert stage_work("teacher", c, SMALL, layout) == teacher
    measured = c.teacher.model_copy(update={"evaluate_every": 50, "dev_queries": 10, "dev_passages": 2000})
    dev = stage_work("teacher", c.model_copy(update={"teacher": measured}), SMALL, layout)
    assert dev["token"] == 2 * (1000 * 100 + 10 * 32)
    assert stage_work("embed", c, SMALL, layout) == {"embed start": 1, "token": 1000 * 100 + 600 * 32}
    assert layout.engine == layout.evaluate_engine == layout.votes == "exact"
    retrieve = {"retrieve start": 1, "exact product": 400 * 32 * 80_000, "exact row": 400 * 100}
    assert stage_work("retrieve", c, SMALL, layout) == retrieve
    assert stage_work("label", c, SMALL, layout) == {
        "label start": 1,
        "vote product": 400 * 24 * 80_000,
    }
    # Two scorers of 100 candidates of each query, one of which encodes.
    ensemble = {"ensemble start": 1, "scored pair": 2 * 400 * 100, "token": 1000 * 100 + 400 * 32}
    assert stage_work("ensemble", c, SMALL, layout) == ensemble
    # The student embeds; teacher and student search; four systems are measured.
    evaluate = {
        "evaluate start": 1,
        "token": 1000 * 100 + 200 * 32,
        "exact product": 2 * 200 * 32 * 80_000,
        "measured row": 4 * 200 * 500,
        "bm25_token_s": 100_000,
        "bm25_score_s": 200 * 1000,
    }
    assert stage_work("evaluate", c, SMALL, layout) == evaluate
    # Without an ensemble, evaluate embeds with the encoder as it is too.
    plain = config("distill.objective=self_distillation", "evaluate.depth=500")
    found = stage_work("evaluate", plain, SMALL, lay_out(plain, SMALL, machines()))
    assert found["token"] == 2 * evaluate["token"]
    few = config("evaluate.baselines=[encoder, bm25]", "evaluate.bm25_passages=999")
    assert "bm25_token_s" not in stage_work("evaluate", few, SMALL, lay_out(few, SMALL, machines()))
    given = config("teacher.checkpoint=/t")
    assert stage_work("teacher", given, SMALL, lay_out(given, SMALL, machines())) == {"teacher start": 1}


def test_work_of_approximate_search_and_votes_by_hand() -> None:
    sizes = replace(SMALL, passages=20_000)  # 1.6 million embeddings
    c = config("retrieve.engine=faiss", "retrieve.cells=1024", "label.neighbours=faiss")
    layout = lay_out(c, sizes, machines())
    assert (layout.servers["faiss"].servers, layout.servers["faiss"].threads, layout.votes) == (1, 2, "faiss")
    look = 400 * 32 * (1024 + 32 * 1.6e6 / 1024)
    scored = 400 * 1600 * 80 * 32  # 16 times the depth
    found = stage_work("retrieve", c, sizes, layout)["faiss product"]
    assert found == pytest.approx(1.6e6 * 1024 + look + scored)
    c = config("retrieve.engine=centroids", "embed.codec=residual2", "label.neighbours=estimate")
    layout = lay_out(c, SMALL, machines())
    known = 1024  # the power of two below min(8 sqrt(80,000), 80,000 / 40)
    look = 400 * 32 * (known + 32 * 80_000 / known)
    found = stage_work("retrieve", c, SMALL, layout)["centroids product"]
    assert found == pytest.approx(look + 400 * 1000 * 80 * 32)  # 1,024 candidates of 1,000 passages
    # All 80,000 rows are a sample, of which 1,024 cells are made.
    labels = {"label start": 1, "query": 400, "exact product": 80_000 * 1024}
    assert stage_work("label", c, SMALL, layout) == labels
    assert stage_work("embed", c, SMALL, layout)["codec product"] == 80_000 * 1024 + 40_960 * 1024
    c = config("distill.objective=cross_encoder", "cross_encoder.model=m", "distill.negatives_depth=50")
    pairs = stage_work("cross_encoder", c, SMALL, lay_out(c, SMALL, machines()))
    assert pairs["pair token"] == 400 * 51 * 116
    c = config("distill.objective=cross_encoder", "cross_encoder.scores=s.tsv")
    assert e.estimate(c, SMALL, rates(), lay_out(c, SMALL, machines()), ASSUMED).stages[4].name == "cross_encoder"


def test_seconds_by_hand_and_over_machines() -> None:
    """Amdahl: what scales shrinks by the number of machines, the rest stays."""
    c = config("embed.precision=fp32", "label.neighbours=exact", "evaluate.depth=1000")
    sizes = replace(SMALL, passages=100_000)
    one, ten = (
        {
            s: parts(s, c, sizes, rates(), machines(n, 4))
            for s in ("collection", "embed", "label", "evaluate", "teacher")
        }
        for n in (1, 10)
    )
    assert one["collection"] == {"read the source": 2.0, "start": 5.0, "check and write": pytest.approx(10.06)}
    # 1e-4 s a token on two cores, here on four.
    assert one["embed"] == {"start": 5.0, "encode": pytest.approx((100_000 * 100 + 600 * 32) * 1e-4 / 2)}
    assert ten["embed"]["encode"] == pytest.approx(one["embed"]["encode"] / 10)
    assert ten["label"]["cluster, and votes of the collection"] == pytest.approx(400 * 24 * 8e6 * 1e-9 / 20)
    driver = "exact scores of the best, run files and measures"
    assert ten["evaluate"][driver] == one["evaluate"][driver] == pytest.approx(4 * 200 * 1000 * 1e-5)
    assert ten["evaluate"]["score all passages"] == pytest.approx(one["evaluate"]["score all passages"] / 10)
    assert one["evaluate"]["index BM25"] == ten["evaluate"]["index BM25"] == pytest.approx(1e7 * 1e-6)
    # One worker has one machine, however many there are.
    assert ten["teacher"]["training steps"] == one["teacher"]["training steps"]
    plan = e.estimate(c, sizes, rates(), lay_out(c, sizes, machines(10, 4)), ASSUMED)
    assert plan.serial_seconds < plan.seconds and {p.scales for s in plan.stages for p in s.parts} == {True, False}


def test_a_rate_that_was_not_measured_is_named() -> None:
    c = config("retrieve.engine=faiss")
    costs = {unit: cost for unit, cost in rates().costs.items() if unit != "faiss product"}
    with pytest.raises(UserError, match="faiss product"):
        parts("retrieve", c, SMALL, rates(costs=costs), machines())


def test_gradients_and_storage_travel() -> None:
    c = config("teacher.workers=2", "teacher.steps=10", "run.storage=s3://b/r")
    network = machines(2, 1, network_gbit=0.8)
    layout = lay_out(c, SMALL, network)
    found = e.network_parts("teacher", c, rates(), layout, 0.0, ASSUMED)[0].seconds
    assert found == pytest.approx(10 * 4 * 20e6 / 1e8)  # two workers: half of it twice
    together = lay_out(c, SMALL, machines(1, 4))
    assert e.network_parts("teacher", c, rates(), together, 0.0, ASSUMED)[0].seconds == pytest.approx(
        10 * 80e6 / 6.25e9
    )
    # GPUs of one machine: an A10G has no NVLink, and a third of what the plan assumed for all kinds.
    for kind, link in (("A10G", 6.25e9), ("V100", 100e9)):
        inside = lay_out(c, SMALL, machines(1, 8, 2, kind))
        assert e.network_parts("teacher", c, rates(), inside, 0.0, ASSUMED)[0].seconds == pytest.approx(800e6 / link)
    # 1 GB written and fetched, through two machines of 100 MB/s.
    assert e.network_parts("embed", c, rates(), layout, 1e9, ASSUMED)[0].seconds == pytest.approx(10.0)
    assert not e.network_parts("embed", config(), rates(), lay_out(config(), SMALL, machines()), 1e9, ASSUMED)


def test_ms_marco_on_eight_gpus() -> None:
    cluster = machines(2, 48, 4, "A10G", network_gbit=40.0)
    for codec in ("fp16", "residual2"):
        c = config(f"embed.codec={codec}", "run.storage=s3://bucket/run", "teacher.workers=4", "distill.workers=4")
        layout = lay_out(c, MS_MARCO, cluster)
        carried = on_accelerator(rates(tokens=75.0), "A10G", ASSUMED)
        plan = e.estimate(c, MS_MARCO, carried, layout, ASSUMED)
        embed = plan.stages[2]
        assert embed.storage["embeddings"] == pytest.approx(260 * (8_841_823 * 68 + 509_919 * 32))
        assert layout.engine == ("faiss" if codec == "fp16" else "centroids")
        assert layout.votes == "estimate" and layout.pool.actors == 8 and layout.workers["distill"] == 4
        # 16.7 MFLOP a token at a quarter of 70 TFLOP/s, on 8 GPUs.
        token = (2 * 8e6 + 4 * 75 * 384 * 6) / 17.5e12
        assert carried.costs["token"] == pytest.approx(token) and carried.costs["teacher token"] == pytest.approx(
            3 * token
        )
        tokens = 8_841_823 * 75 + 509_919 * 32
        seconds = {part.name: part.seconds for part in embed.parts}
        assert seconds["encode"] == pytest.approx(tokens * token / 8)
        teacher = {part.name: part.seconds for part in plan.stages[1].parts}
        assert teacher["start kernels"] == pytest.approx(c.teacher.steps * 0.06)
        tokens = c.distill.batch_size * (32 + (1 + c.distill.negatives) * 75) * 1.25 / 4
        step = training_bytes(tokens, carried.shape, on_gpu=True)
        assert plan.stages[6].memory["gpu"] == pytest.approx(0.7 * 2**30 + step)
        assert any("A10G" in text and "gpu_share" in text for text in carried.assumptions)


def test_a_hundred_gpus_and_140_million_passages() -> None:
    c = config("embed.codec=residual2", "run.storage=s3://bucket/run", "retrieve.engine=centroids")
    sizes = replace(MS_MARCO, passages=140_000_000)
    cluster, carried = machines(25, 48, 4, "A10G"), on_accelerator(rates(), "A10G", ASSUMED)
    layout = lay_out(c, sizes, cluster)
    many, few = (parts("embed", c, sizes, carried, m)["encode"] for m in (cluster, machines(2, 48, 4, "A10G")))
    assert layout.pool.actors == 100 and many == pytest.approx(few * 8 / 100)
    assert layout.shard_passages == max(stop - first for first, stop in plan_shards(140_000_000, "auto"))
    # The driver's memory is bounded by ids and labels: 12 bytes a passage.
    assert stage_memory("embed", c, sizes, carried.shape, layout)["driver"] < 4 * 2**30
    # faiss would be one server with 28 bytes a token embedding, 267 GB: the cluster has them, and no machine of it.
    with pytest.raises(UserError, match=r"memory of one node(.|\n)*at most 44.8 GiB(.|\n)*249.2 GiB"):
        lay_out(config("retrieve.engine=faiss"), sizes, cluster)
    large = PlannedCluster((Machines("m", 1, 48, 512, 4, "A10G"),), "test")
    layout = lay_out(config("retrieve.engine=faiss"), sizes, large)
    assert layout.servers["faiss"].memory == pytest.approx(28 * 140e6 * 68, rel=0.01)


def test_memory_and_storage_by_hand() -> None:
    c = config("embed.passages_per_shard=100", "distill.batch_size=20", "evaluate.depth=1000")
    layout, shape = lay_out(c, SMALL, machines()), rates().shape
    # 16 bytes a parameter; 6,000 tokens keep 34 * 384 numbers a layer, 4 bytes each of which 2 are counted in the 34.
    assert training_bytes(6000, shape, on_gpu=False) == 16 * 20e6 + 6000 * 6 * 68 * 384
    assert training_bytes(1500, shape, on_gpu=True) == 16 * 20e6 + 1500 * 6 * 34 * 384
    process, device = encoder_bytes(c, SMALL, shape, layout)
    shard = 100 * 80 * (256 + 256 + 8)
    assert device == 0 and process == pytest.approx(0.45 * 2**30 + shard + 160e6 + 1440 * 384 * 80)
    memory = stage_memory("collection", c, SMALL, shape, layout)
    assert memory == {"driver": pytest.approx(0.55 * 2**30 + 12_000 + 400 * 600 + 250 * 600)}
    plan = e.estimate(c, SMALL, rates(), layout, ASSUMED)
    assert plan.stages[0].storage == {"corpus": 100 + 2 * 100_000, "queries": 0}
    assert plan.stages[1].storage == {"teacher": 81e6} and plan.stages[4].storage == {"labels": 400 * 24e3}
    assert plan.stages[3].storage == {"rankings": 0}  # and no index, as the engine is exact
    assert storage_units("rankings", c, SMALL) == 400 * 100 and storage_units("evaluation", c, SMALL) == 200 * 1000


def test_rates_of_other_hardware_are_assumptions() -> None:
    measured = replace(rates(), device="cuda", accelerator="A100")
    same = on_accelerator(measured, "A100", ASSUMED)
    assert same == measured and not same.assumptions
    faster = on_accelerator(measured, "H100", ASSUMED)
    assert faster.costs["token"] == pytest.approx(1e-4 * 312 / 989) and faster.costs["text"] == 1e-4
    assert len(faster.assumptions) == 1 and "H100" in faster.assumptions[0]
    half, full = (on_accelerator(rates(), "T4", parse_assumptions([f"gpu_share={x}"])) for x in (0.5, 1))
    assert half.costs["token"] == pytest.approx(2 * full.costs["token"]) and full.lanes["encode"] == 1
    assert half.costs["exact product"] == pytest.approx(2 * 128 / 4.05e12)
    base = for_backbone(rates(), "bert-base-uncased")
    ratio = (2 * (109_482_240 - 23_837_184) + 4 * 100 * 768 * 12) / (2 * 8e6 + 4 * 100 * 384 * 6)
    assert base.costs["token"] == pytest.approx(1e-4 * ratio) and base.shape.layers == 12
    assert base.costs["text"] == 1e-4 and base.storage["teacher"][0] == pytest.approx(81e6 * 109_482_240 / 20e6)
    assert for_backbone(rates(), "somebody/else") == rates()
    with pytest.raises(UserError, match="the cluster has none"):
        on_accelerator(measured, None, ASSUMED)
    with pytest.raises(UserError, match="a GPU that is not known here"):
        on_accelerator(rates(), "Z9000", ASSUMED)


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
    def read(text: str, prices: Prices | None = None) -> PlannedCluster:
        (tmp_path / "c.yaml").write_text(text)
        return read_cluster(str(tmp_path / "c.yaml"), prices)

    aws = read(AWS)
    head, gpu = aws.groups
    assert (head.cpus, head.spot, head.usd) == (0, False, None)
    assert (gpu.count, gpu.cpus, gpu.gpus, gpu.accelerator, gpu.spot) == (3, 48, 4, "A10G", True)
    assert aws.gpus == 12 and len(aws.nodes) == 3
    # A price by the machine type, by the name of the node type, and from a file; all must be known for a cost.
    assert aws.usd is None and read(AWS, Prices({"g5.12xlarge": 2.0})).usd is None
    paid = read(AWS, Prices({"g5.12xlarge": 2.0, "head": 0.5}))
    assert [m.usd for m in paid.groups] == [0.5, 2.0] and paid.usd == pytest.approx(0.5 + 3 * 2.0)
    (tmp_path / "prices.yaml").write_text("m5.xlarge: 0.25\ng5.12xlarge: [9, 3]\n")
    listed = read(AWS, Prices({"gpu": 1.0}, str(tmp_path / "prices.yaml")))
    assert [m.usd for m in listed.groups] == [0.25, 1.0]
    assert read(AWS, Prices(file=str(tmp_path / "prices.yaml"))).usd == pytest.approx(0.25 + 3 * 3)
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
    monkeypatch.setattr(
        "ckd_ray.plan.encoder.load_encoder", lambda config: pytest.fail("measured before it was refused")
    )
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
    for text in ("{", "[]", '{"format": 0}', json.dumps({**rates().to_dict(), "costs": {"token": -1}})):
        file.write_text(text)
        with pytest.raises(UserError):
            make_plan(config(), given=given, rates=str(file))
    broken = rates().to_dict()
    del broken["lanes"]
    file.write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"(?s)rates are missing.*found: no lanes"):
        load_rates(str(file))
    monkeypatch.setattr("ckd_ray.plan.job.count_collection", lambda *a, **k: pytest.fail("counted before"))
    save_rates(replace(rates(), device="cuda", accelerator="T4"), str(file))
    with pytest.raises(UserError, match="the cluster has none"):
        make_plan(config(), rates=str(file))
    for wrong in ("g5.xlarge", "=1", "a=b", "a=-1"):
        with pytest.raises(UserError, match="not a price"):
            parse_prices([wrong])
    assert parse_prices(["g5.xlarge=0.5", "a=b=1"]) == {"g5.xlarge": 0.5, "a=b": 1.0}
    for wrong in ("gpu_share", "gpu_share=0", "other=1", "gpu_share=x"):
        with pytest.raises(UserError, match="not an assumption"):
            parse_assumptions([wrong])
    assert parse_assumptions(["gpu_share=0.5"])["gpu_share"] == 0.5


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
        assert len(sample.queries) == 8 and len(set(sample.passages)) == 20
        texts = Path(tiny_collection, "collection.tsv").read_text().splitlines()
        assert set(sample.passages) - {line.partition("\t")[2] for line in texts[:20]}  # not the first ones only


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


def test_plan_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The command with given rates and sizes: one object on standard output, costs that add up, a table for people."""
    from ckd_ray.cli import app

    (tmp_path / "c.yaml").write_text(AWS)
    save_rates(rates(), str(tmp_path / "rates.json"))
    options = ["plan", "--cluster", str(tmp_path / "c.yaml"), "--rates", str(tmp_path / "rates.json"), "--passages"]
    options += ["8841823", "--queries", "502939", "--tokens-per-passage", "75", "--set", "model.doc_maxlen=180"]
    options += ["--eval-queries", "6980", "--set", "run.storage=s3://b/r", "--set", "retrieve.engine=auto"]
    app([*options, "--price", "g5.12xlarge=2", "--price", "m5.xlarge=0.5", "--json"], standalone_mode=False)
    out = json.loads(capsys.readouterr().out)
    names = [stage["stage"] for stage in out["stages"]]
    assert names == list(STAGES)
    assert out["seconds"] == pytest.approx(sum(stage["seconds"] for stage in out["stages"]), abs=1)
    assert out["cluster"]["usd_per_hour"] == pytest.approx(6.5)
    assert out["cost_usd"] == pytest.approx(6.5 * out["seconds"] / 3600, rel=0.01)
    assert out["node_hours"] == pytest.approx(4 * out["seconds"] / 3600, rel=0.01)
    assert out["cost_usd"] == pytest.approx(sum(stage["cost_usd"] for stage in out["stages"]), abs=0.1)
    longest = max(out["stages"], key=lambda stage: stage["seconds"])
    assert out["bound"]["stage"] == longest["stage"] and longest["bound"] == out["bound"]["waits_for"]
    assert out["storage_bytes"] == pytest.approx(sum(sum(s["storage_bytes"].values()) for s in out["stages"]), abs=50)
    assert set(out["memory_bytes"]) == {"driver", "actor", "gpu"} and out["assumptions"]
    assert out["warnings"] == [] and out["collection"]["queries"] == {"train": 502939, "dev": 6980, "test": 6980}
    save_rates(rates(load=3.0, backbone="other", version="0"), str(tmp_path / "rates.json"))
    large = ["--set", "distill.batch_size=20000", "--set", "run.storage=runs", "--price", "x9.large=1"]
    app([*options, *large, "--assume", "gpu_share=0.5"], standalone_mode=False)
    said = capsys.readouterr()
    for warning in (
        "the rates are of other",
        "the rates are of ckd-ray 0,",
        "the machine was busy",
        "distill: ",
        "run.storage is a local",
        "--price x9.large: the cluster has no such node type; it has m5.xlarge, head, g5.12xlarge, gpu",
    ):
        assert f"warning: {warning}" in said.err
    assert said.out == "" and "evaluate" in said.err and "assumed: no A10G was measured: 50%" in said.err
    assert "no price is known: add --price NODE_TYPE=USD_PER_HOUR" in said.err and "node hours" in said.err


def test_sample_of_a_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collection that the calibration writes, and the configuration that it runs."""
    c = config("label.feedback_passages=[1, 3]", "teacher.evaluate_every=10", "embed.precision=fp32")
    for name, here in (("cpus", machines()), ("gpus", machines(1, 8, 1, "T4"))):
        monkeypatch.setattr("ckd_ray.plan.calibrate.this_machine", lambda here=here: here)
        expected = {"cpus": SampleSizes(1500, 3000, 300, 16), "gpus": SampleSizes(22_500, 45_000, 4500, 100)}[name]
        assert sample_sizes(c) == expected
        assert sample_sizes(c, SMALL) == SampleSizes(1000, 400, 100, expected.steps)
    assert sample_sizes(c, SMALL).scaled(1 / 5) == SampleSizes(200, 80, 20, 20)
    monkeypatch.undo()
    count = SampleSizes(100, 30, 4, 8)
    write_sample(tmp_path / "source", Sample(["a\tb\nc"], ["what", "why"]), count, ["dev"], 2)
    lines = (tmp_path / "source" / "collection.tsv").read_text().splitlines()
    assert len(lines) == 100 and lines[99] == "p99\ta b c"
    assert (tmp_path / "source" / "queries.dev.tsv").read_text().splitlines()[0] == "q30\twhat"
    assert (tmp_path / "source" / "qrels.dev.tsv").read_text().splitlines()[3] == "q33\t0\tp33\t2"
    found = sample_config(c, tmp_path, count, ["dev"], ("faiss", "exact", "estimate"))
    assert (found.retrieve.engine, found.label.neighbours, found.evaluate.splits) == ("faiss", "estimate", ["dev"])
    assert found.teacher.steps == found.distill.steps == 8 and found.teacher.evaluate_every == 0
    assert found.retrieve.depth == found.distill.negatives_depth and 3 <= found.retrieve.depth < 100
    # Scores of a file belong to the real collection.
    scored = config("distill.objective=cross_encoder", "cross_encoder.scores=s.tsv")
    found = sample_config(scored, tmp_path, count, ["dev"], ("exact", "exact", "feedback"))
    assert found.distill.objective == "self_distillation" and found.cross_encoder.scores is None


@pytest.mark.soak
def test_calibration_runs_the_stages(tiny_backbone: str, tiny_collection: str, tmp_path: Path) -> None:
    """The real stages at two sizes, in processes of their own; rates are kept and read again."""
    c = load_config(None, overrides(tmp_path, tiny_backbone, tiny_collection, "label.neighbours=exact"))
    kept = tmp_path / "rates.json"
    planned = make_plan(c, keep=str(kept))
    assert not (tmp_path / "tiny").exists()
    assert json.loads(json.dumps(planned.rates.to_dict())) == json.loads(kept.read_text())
    assert planned.sizes.passages == 60 and 20 < planned.sizes.kept <= planned.sizes.tokens <= 48
    assert planned.rates.shape.layers == 2 and planned.rates.shape.hidden == 32
    ran = [entry["stage"] for entry in planned.rates.observations]
    assert ran == [*STAGES, *STAGES, "retrieve"]
    # At such sizes processes that start take nearly all of the time, in the plan as in the runs.
    took = sum(entry["seconds"] for entry in planned.rates.observations[8:16])
    assert planned.plan.seconds > 0.5 * took and all(stage.seconds > 0 for stage in planned.plan.stages)
    stored = {folder: size for stage in planned.plan.stages for folder, size in stage.storage.items()}
    assert stored["teacher"] == pytest.approx(stored["student"], rel=0.2) and stored["embeddings"] > 60 * 20 * 16 * 2
    assert "tokens" in render(planned)
    again = make_plan(c, rates=str(kept), given=GivenSizes(60, 24, planned.sizes.tokens))
    assert again.plan.stages[1].seconds == pytest.approx(planned.plan.stages[1].seconds)


def test_what_stages_refuse_the_plan_refuses(tiny_backbone: str, tiny_collection: str, tmp_path: Path) -> None:
    c = load_config(None, overrides(tmp_path, tiny_backbone, tiny_collection, "model.backbone=/no/such"))
    with pytest.raises(UserError) as refused:
        make_plan(c)
    assert "--rates FILE" in str(refused.value)


def test_instance_types() -> None:
    assert instances()["g5.12xlarge"].gpus == 4 and instances()["m6i.2xlarge"].accelerator is None
