"""The cluster files that we ship: valid to Ray, closed, priced by what they say, and in step with the package."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import ckd_ray
from ckd_ray.checks import load_config
from ckd_ray.errors import UserError
from ckd_ray.jobs.placeholders import check_config_filled_in, check_launcher_filled_in
from ckd_ray.jobs.submit import BEGIN
from ckd_ray.ray_util.machines import NODES_VARIABLE, RESOURCES_VARIABLE, parse_resources
from ckd_ray.store.codec import bytes_per_token

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
LAUNCHED = sorted(p for p in FOLDER.glob("*.yaml") if "\nprovider:" in p.read_text())
MSMARCO_TOKENS = 600_000_000
GB = 10**9
PINNED = dict(re.findall(r"^([A-Za-z-]+)==([0-9.]+)", (ROOT / "constraints.txt").read_text(), re.M))


def read(name: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return value


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda p: p.name)
def test_a_launcher_s_file_is_valid_and_asks_for_the_token(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])
    starts = {kind: " ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker")}
    assert all("RAY_AUTH_MODE=token" in command for command in starts.values())
    assert "--dashboard-host=127.0.0.1" in starts["head"] and "0.0.0.0" not in path.read_text()


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_machines_in_a_cloud(name: str) -> None:
    """Eight spot GPUs, a head without any that takes no tasks, all that the package needs, and a pinned Ray."""
    config = read(name)
    types = config["available_node_types"]
    assert config["provider"]["cache_stopped_nodes"] is False
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0} and types["gpu"]["min_workers"] == 2
    assert "--num-cpus=0" in " ".join(config["head_start_ray_commands"])
    installed = next(c for c in config["setup_commands"] if "pip install" in c)
    assert "--constraint ~/ckd-ray/constraints.txt" in installed
    assert (ROOT / config["file_mounts"]["~/ckd-ray/constraints.txt"]).is_file()
    wanted = re.search(r"^dependencies = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert wanted is not None
    for needed in re.findall(r'"([A-Za-z0-9_-]+)', wanted[1]):
        assert re.search(rf'[ "]{needed}[\s\[]', installed, re.I), needed


def test_aws_is_spot_closed_and_has_room_for_ms_marco() -> None:
    config = read("aws.yaml")
    head, gpu = (config["available_node_types"][name]["node_config"] for name in ("head", "gpu"))
    assert gpu["InstanceMarketOptions"] == {"MarketType": "spot"} and "InstanceMarketOptions" not in head
    (rule,) = config["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"], [r["CidrIp"][-3:] for r in rule["IpRanges"]]) == (22, 22, ["/32"])
    codec = load_config(str(ROOT / "configs/msmarco.yaml")).embed.codec
    stores = 2 * MSMARCO_TOKENS * (bytes_per_token(codec, 128) + 4)  # and the token ids
    cache = re.search(r"CKD_RAY_CACHE_GIB=(\d+)", " ".join(config["worker_start_ray_commands"]))
    assert cache is not None and stores < int(cache[1]) * 2**30
    image_and_python = 85 * GB
    disk = gpu["BlockDeviceMappings"][0]["Ebs"]
    assert image_and_python + int(cache[1]) * 2**30 + 50 * GB < disk["VolumeSize"] * 2**30
    assert disk["Encrypted"] and disk["DeleteOnTermination"]
    with pytest.raises(UserError, match=r"gpu\.node_config\.ImageId; provider\.security_group(.|\n)*checkip"):
        check_launcher_filled_in(config, "aws.yaml")
    for kind in (head, gpu):
        kind["ImageId"] = "ami-12c6146b"
    rule["IpRanges"] = [{"CidrIp": "198.18.0.7/32"}]
    check_launcher_filled_in(config, "aws.yaml")


def test_gcp_s_gpu_machines_get_a_disk_and_a_driver_that_they_can_use() -> None:
    config = read("gcp.yaml")
    (disk,) = config["available_node_types"]["gpu"]["node_config"]["disks"]
    zone = config["provider"]["availability_zone"]
    assert disk["initializeParams"]["diskType"] == f"zones/{zone}/diskTypes/pd-balanced"
    driver = re.search(r"-nvidia-(\d+)$", disk["initializeParams"]["sourceImage"])
    assert driver is not None and int(driver[1]) >= 580, "CUDA 13, which the pinned torch is built for, needs it"


def test_the_image_is_built_from_what_is_sent_and_from_extras_that_exist() -> None:
    built = (FOLDER / "Dockerfile").read_text()
    wanted = re.search(r"/tmp/ckd-ray\[([a-z0-9,]+)\]", built)
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([a-z0-9]+) = ", table, re.M))
    assert wanted is not None and {"ir", "tune", "cluster"} <= set(wanted[1].split(",")) <= extras
    assert f"FROM rayproject/ray:{PINNED['ray']}-py311-gpu" in built
    sent = re.findall(r"^!(\S+)", (FOLDER / "Dockerfile.dockerignore").read_text(), re.M)
    assert {"ckd_ray", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == set(sent)
    assert all((ROOT / name).exists() for name in sent)


def test_each_file_of_this_folder_is_described() -> None:
    page = (ROOT / "docs/how-to/cluster.md").read_text() + (ROOT / "docs/how-to/kubernetes.md").read_text()
    for path in FOLDER.iterdir():
        assert f"cluster/{path.name}" in page or path.suffix == ".dockerignore", path.name


# ray.io/v1 (KubeRay's API reference); what is not here would be refused, or ignored, by the operator.
_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
_HEAD = {"serviceType", "enableIngress", "rayStartParams", "template"}
_WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
_CONTAINER = {"name", "image", "env", "envFrom", "resources", "volumeMounts"}


def test_the_page_on_security_names_every_file_that_opens_the_dashboard() -> None:
    hosts = {p.name: re.findall(r"dashboard-host[=:]\s*([0-9.]+)", p.read_text()) for p in FOLDER.glob("*.yaml")}
    assert all(hosts.values()), "a file that leaves it to Ray's default"
    opened = {name for name, found in hosts.items() if set(found) != {"127.0.0.1"}}
    page = (ROOT / "docs" / "explanation" / "security.md").read_text()
    told = page.split("no dashboard to other addresses than loopback")[1].split("\n\n")[0]
    assert opened == set(re.findall(r"`cluster/([a-z-]+\.yaml)`", told)) == {"kubernetes-rayjob.yaml"}


def test_kuberay_has_fields_of_the_crd_a_token_and_no_open_service() -> None:
    documents = list(yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text()))
    assert [(d["apiVersion"], d["kind"]) for d in documents] == [
        ("networking.k8s.io/v1", "NetworkPolicy"),
        ("ray.io/v1", "RayCluster"),
    ]
    policy, cluster = (d["spec"] for d in documents)
    mine = {"matchLabels": {"ray.io/cluster": documents[1]["metadata"]["name"]}}
    assert policy == {"podSelector": mine, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": mine}]}]}
    assert cluster.keys() == _CLUSTER and cluster["authOptions"] == {"mode": "token", "secretName": "ckd-ray-token"}
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head.keys() == _HEAD and workers.keys() == _WORKERS
    assert head["serviceType"] == "ClusterIP" and head["enableIngress"] is False
    assert head["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert all(isinstance(value, str) for value in head["rayStartParams"].values()), "a map of strings in the CRD"
    pods = [part["template"]["spec"] for part in (head, workers)]
    for pod in pods:
        (container,) = pod["containers"]
        assert container.keys() <= _CONTAINER and container["resources"]["requests"] == container["resources"]["limits"]
        volumes = {v["name"] for v in pod["volumes"]}
        assert {m["name"] for m in container["volumeMounts"]} == volumes
        assert all(isinstance(e["value"], str) for e in container.get("env", []))
    assert workers["replicas"] * int(pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) == 8
    (worker,) = pods[1]["containers"]
    cache = next(e["value"] for e in worker["env"] if e["name"] == "CKD_RAY_CACHE")
    mount = next(m["mountPath"] for m in worker["volumeMounts"] if m["name"] == "cache")
    assert Path(mount) in Path(cache).parents, "an emptyDir itself has mode 0777, which the cache refuses"
    assert cluster["rayVersion"] == PINNED["ray"]


# The fields of KubeRay 1.7's RayJob that the file uses, with their types; others are refused here, as by Kubernetes.
_QUANTITIES = {"type": "object", "additionalProperties": {"type": "string"}}


def _closed(required: str = "", **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "additionalProperties": False, "required": required.split()}


def _template() -> dict[str, Any]:
    text, entry = {"type": "string"}, {"type": "array", "minItems": 1}
    container = _closed(
        "name image resources",
        name=text,
        image=text,
        env=entry | {"items": _closed("name value", name=text, value=text)},
        resources=_closed("requests limits", requests=_QUANTITIES, limits=_QUANTITIES),
        volumeMounts=entry | {"items": _closed("name mountPath", name=text, mountPath=text)},
    )
    volume = _closed(
        "name",
        name=text,
        configMap=_closed("name", name=text),
        emptyDir=_closed("sizeLimit", medium={"enum": ["Memory"]}, sizeLimit=text),
    )
    pod = _closed(
        "containers",
        automountServiceAccountToken={"type": "boolean"},
        nodeSelector=_QUANTITIES,
        tolerations=entry | {"items": _closed("key operator effect", key=text, operator=text, effect=text)},
        containers=entry | {"items": container},
        volumes=entry | {"items": volume},
    )
    return _closed("metadata spec", metadata=_closed("labels", labels=_QUANTITIES), spec=pod)


def _job() -> dict[str, Any]:
    text, count, flag = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
    head = _closed(
        "rayStartParams template",
        serviceType={"enum": ["ClusterIP"]}, enableIngress={"const": False}, rayStartParams=_QUANTITIES,
        template=_template(),
    )  # fmt: skip
    workers = _closed(
        "groupName minReplicas maxReplicas rayStartParams template",
        groupName=text, replicas=count, minReplicas=count, maxReplicas=count, rayStartParams=_QUANTITIES,
        template=_template(),
    )  # fmt: skip
    cluster = _closed(
        "headGroupSpec workerGroupSpecs",
        rayVersion=text,
        enableInTreeAutoscaling=flag,
        autoscalerOptions=_closed(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=count),
        authOptions=_closed("mode secretName", mode={"enum": ["token"]}, secretName=text),
        headGroupSpec=head,
        workerGroupSpecs={"type": "array", "items": workers},
    )
    return _closed(
        "entrypoint rayClusterSpec",
        entrypoint=text,
        metadata=_QUANTITIES,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        shutdownAfterJobFinishes=flag,
        ttlSecondsAfterFinished=count,
        backoffLimit=count,
        rayClusterSpec=cluster,
    )


def test_the_job_for_kubernetes_has_fields_of_the_crd_and_workers_from_zero() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    policy, job = yaml.safe_load_all((FOLDER / "kubernetes-rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    jsonschema.validate(spec, _job())
    with pytest.raises(jsonschema.ValidationError, match="shutDownAfterJobFinishes"):
        jsonschema.validate(spec | {"shutDownAfterJobFinishes": True}, _job())
    cluster = spec["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert spec["shutdownAfterJobFinishes"] and cluster["enableInTreeAutoscaling"]
    assert cluster["rayVersion"] == PINNED["ray"] and head["rayStartParams"]["num-cpus"] == "0"
    pods = [part["template"] for part in (head, workers)]
    (driver,), (worker,) = (pod["spec"]["containers"] for pod in pods)
    # The autoscaler runs in the head's pod, and asks Kubernetes for pods by the account of that pod.
    assert (
        "automountServiceAccountToken" not in pods[0]["spec"] and "nvidia.com/gpu" not in driver["resources"]["limits"]
    )
    asked = parse_resources(next(e["value"] for e in driver["env"] if e["name"] == RESOURCES_VARIABLE))
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert workers["replicas"] == workers["minReplicas"] == 0 and asked == {"GPU": workers["maxReplicas"] * gpus}
    # Everybody but these pods and the operator is kept out.
    labels = {"matchLabels": pods[0]["metadata"]["labels"]}
    assert pods[1]["metadata"] == pods[0]["metadata"] and policy["spec"]["podSelector"] == labels
    ours, operator = policy["spec"]["ingress"]
    assert ours == {"from": [{"podSelector": labels}]} and operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
    # The command is one that there is, with a configuration that is mounted and storage that all pods see.
    assert spec["metadata"]["app"] == "ckd-ray"
    words = shlex.split(spec["entrypoint"])
    assert (
        words[:5] == ["echo", BEGIN, "&&", "ckd-ray", "train"]
        and words[words.index("--config") + 1] == "/config/run.yaml"
    )
    config = load_config(str(ROOT / "configs/msmarco.yaml"), [words[words.index("--set") + 1]])
    with pytest.raises(UserError, match=r"run\.storage"):
        check_config_filled_in(config)


def test_the_job_for_skypilot() -> None:
    job = read("skypilot.yaml")
    assert job.keys() == {"name", "resources", "num_nodes", "workdir", "envs", "secrets", "setup", "run"}
    assert job["resources"].keys() == {"accelerators", "use_spot", "disk_size", "job_recovery"}
    assert job["secrets"] == {"RAY_AUTH_TOKEN": None} and "0.0.0.0" not in job["run"]
    for name in ("setup", "run"):
        done = subprocess.run(["bash", "-n"], input=job[name], text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (ROOT / job["envs"]["CONFIG"]).is_file() and NODES_VARIABLE in job["run"]
    extras = re.search(r"'\.\[([a-z,]+)\]'", job["setup"])
    assert extras is not None and "cluster" in extras[1].split(",")  # `ray start` and health-check


def test_the_published_recipe_is_kept() -> None:
    """method.md, step by step: every setting stands in the file, whatever the defaults are."""
    config = load_config(str(ROOT / "configs" / "published.yaml"))
    assert config.run.storage.startswith("s3://") and config.model.backbone == "bert-base-uncased"
    model = config.model
    assert (model.dim, model.query_maxlen, model.doc_maxlen, model.mask_punctuation) == (128, 32, 180, True)
    for section in (config.teacher, config.distill):
        assert (section.batch_size, section.learning_rate, section.negatives) == (36, 3.0e-6, 1)
        assert section.score_scale == 1.0
        assert isinstance(section.workers, int) and section.batch_size % section.workers == 0
    label, distill = config.label, config.distill
    assert (label.feedback_passages, label.clusters, label.voters, label.token_vote) == (3, 24, 10, "collection")
    assert (distill.objective, distill.temperature, distill.beta, distill.expansion_size) == (
        "collective",
        0.25,
        1.0,
        10,
    )
    assert (config.retrieve.nprobe, config.retrieve.candidates, config.retrieve.depth) == (32, 1024, 100)
    assert (distill.loss, distill.smoothing, distill.denoise, distill.zero_row_floor) == ("kl", 0.0, None, False)
    assert (distill.sampling, distill.negatives_depth) == ("uniform", 100)
    assert config.distill.steps * 36 >= 10 * 502_939


def test_the_recipe_for_ms_marco_has_the_default_loss_and_the_published_budget() -> None:
    ours, published = (load_config(str(ROOT / "configs" / f"{name}.yaml")) for name in ("msmarco", "published"))
    d = ours.distill
    assert (d.loss, d.temperature, d.beta, d.score_scale, d.sampling) == ("decoupled", "auto", "auto", "auto", "strata")
    assert isinstance(d.workers, int) and d.batch_size % d.workers == 0 and d.steps * d.batch_size >= 10 * 502_939
    for section in ("collection", "model", "embed", "label", "evaluate"):
        assert getattr(ours, section) == getattr(published, section)
    assert published.retrieve.recall is None  # the published search takes probes and candidates as they are
    assert ours.retrieve.recall is not None and ours.retrieve.model_copy(update={"recall": None}) == published.retrieve


@pytest.mark.skipif(sys.platform != "linux", reason="ir_datasets is only asked for its registry")
def test_the_collection_of_the_recipe_has_the_labelled_queries() -> None:
    ir_datasets = pytest.importorskip("ir_datasets")
    c = load_config(str(ROOT / "configs" / "msmarco.yaml")).collection
    counts = {
        split: ir_datasets.load(f"{c.path}/{getattr(c, split)}").metadata()["queries"]["count"]
        for split in ("train", "dev", "test")
    }
    assert counts == {"train": 502_939, "dev": 6_980, "test": 43}
    assert ir_datasets.load(c.path).metadata()["docs"]["count"] == 8_841_823


def test_the_version_is_the_same_everywhere() -> None:
    """The newest release of the changelog, and the tag of the image in manifests and pages."""
    released = re.findall(r"^## \[([0-9.]+)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == ckd_ray.__version__
    pages = [*FOLDER.glob("*.yaml"), FOLDER / "Dockerfile", ROOT / "docs/how-to/kubernetes.md"]
    tags = [tag for page in pages for tag in re.findall(r"/ckd-ray:([0-9.]+[0-9])", page.read_text())]
    assert len(tags) >= 8 and set(tags) == {ckd_ray.__version__}
