"""Everything that starting a cluster changes in an account and on machines, as lines for people before they agree.

The list follows from the file alone, so `--dry-run` needs no credentials and sends no request. It says what Ray's
launcher does (`bootstrap_config` of its provider) and what `prepare_account` adds to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckd_ray.jobs.aws import PASS_ITSELF, head_passes_itself, launcher_s_profile, port_names, rules, wanted_rules
from ckd_ray.jobs.launcher_file import LauncherFile, NodeType
from ckd_ray.progress import without_secrets

_GCP_ACCOUNT = "ray-autoscaler-sa-v1"
_GCP_ROLES = "storage.objectAdmin, compute.admin, iam.serviceAccountUser, iam.roleViewer"


@dataclass(frozen=True)
class Change:
    """One change: `what` is a kind of thing (machines, IAM role, ...), `text` what happens to it."""

    what: str
    text: str


def account_changes(launcher: LauncherFile, storage: str) -> list[Change]:
    """The changes, in the order in which they are made.

    Args:
        storage: `run.storage`, where the job writes.
    """
    of_provider = {"aws": _aws, "gcp": _gcp, "local": _own_machines}.get(launcher.provider, _unknown)
    found = [*of_provider(launcher), *_job(storage)]
    source = launcher.token_source
    if source is not None:
        text = f"{source}: copied to the machines; made first where it is missing, readable by you alone"
        found.append(Change("token", text))
    return found


def show_changes(launcher: LauncherFile, changes: list[Change]) -> list[str]:
    """Lines for people."""
    width = max(len(change.what) for change in changes)
    where = {"aws": "in your AWS account", "gcp": "in your Google Cloud project"}.get(launcher.provider, "there")
    lines = [f"what this changes {where} (what is there already is kept, if nothing else is said):"]
    lines += [f"  {change.what:<{width}}  {change.text}" for change in changes]
    if not launcher.own_machines:
        lines.append("  `ckd-ray down` ends the machines and leaves the rest")
    return lines


def _aws(launcher: LauncherFile) -> Iterator[Change]:
    prepared = launcher.prepared
    provider, kinds = prepared["provider"], prepared["available_node_types"]
    region = provider.get("region")
    configs = [kind.get("node_config") or {} for kind in kinds.values()]
    profile = launcher_s_profile(prepared)
    if profile is not None:
        yield Change(
            "IAM role",
            f"{profile}, with an instance profile of this name: made if it is missing, with AmazonEC2FullAccess and"
            " AmazonS3FullAccess; the head gets it",
        )
    if head_passes_itself(prepared):
        yield Change(
            "IAM policy",
            f"{PASS_ITSELF}, inline on the role {profile}: written unless it is there; allows iam:PassRole of this role"
            " to EC2, without which the head cannot start workers",
        )
    if "ssh_private_key" not in prepared["auth"]:
        yield Change("key pair", f"ray-autoscaler_..._{region}: made if it is missing, the private key in ~/.ssh")
    if not all("SecurityGroupIds" in config for config in configs):
        yield Change("security group", _aws_group(launcher))
    if "cloudwatch" in provider:
        yield Change("CloudWatch", "agents, dashboards and alarms, as provider.cloudwatch says")
    yield Change("EC2 machines", _machines(launcher))


def _aws_group(launcher: LauncherFile) -> str:
    settings = launcher.prepared["provider"].get("security_group") or {}
    name = settings.get("GroupName", f"ray-autoscaler-{launcher.prepared['cluster_name']}")
    wanted = wanted_rules(launcher.prepared)
    inside = "everything between its own machines"
    if wanted is None:
        return f"{name}: made if it is missing, with {inside} and SSH from the whole internet"
    doors = ", ".join(f"{port_names(rule)} from {rule[3]}" for rule in rules(wanted)) or "nothing from outside"
    return (
        f"{name}: made if it is missing, with {inside}, and {doors}; every other address is REMOVED from the rules of a"
        " group of this name that Ray's launcher made before"
    )


def _gcp(launcher: LauncherFile) -> Iterator[Change]:
    project = launcher.prepared["provider"].get("project_id")
    yield Change("project", f"{project}: made if it is missing")
    yield Change(
        "service account",
        f"{_GCP_ACCOUNT}@{project}.iam.gserviceaccount.com: made if it is missing; the head gets it",
    )
    yield Change("IAM policy", f"of the project: this account gets the roles {_GCP_ROLES}, unless it has them")
    if "ssh_private_key" not in launcher.prepared["auth"]:
        user = launcher.prepared["auth"]["ssh_user"]
        yield Change(
            "SSH key",
            f"of {user}, in the metadata of the project, which opens all of its machines to the private key: made if it"
            " is missing, the private key in ~/.ssh",
        )
    yield Change("firewall", "none is made or changed")
    yield Change("machines", _machines(launcher))


def _own_machines(launcher: LauncherFile) -> Iterator[Change]:
    provider, user = launcher.prepared["provider"], launcher.prepared["auth"].get("ssh_user")
    hosts = [provider.get("head_ip"), *(provider.get("worker_ips") or [])]
    where = ", ".join(str(host) for host in hosts if host) or f"machines of {provider.get('coordinator_address')}"
    commands = launcher.prepared.get("head_start_ray_commands") or []
    ends = "; a Ray that runs there ends" if any("ray stop" in command for command in commands) else ""
    yield Change("machines", f"{where}, as {user}: the file's file_mounts, setup commands and start commands{ends}")


def _unknown(launcher: LauncherFile) -> Iterator[Change]:
    yield Change(launcher.provider, "what Ray's launcher sets up for this provider; its documentation has the list")
    yield Change("machines", _machines(launcher))


def _job(storage: str) -> Iterator[Change]:
    if "://" in storage:
        yield Change("storage", f"no bucket is made or changed; the job writes below {without_secrets(storage)}")
    else:
        yield Change("storage", f"no bucket is used; the job writes below {storage} of the head")


def _machines(launcher: LauncherFile) -> str:
    def some(kind: NodeType, count: int) -> str:
        return f"{count} x {kind.machine or kind.name}{' (spot)' if kind.spot else ''}"

    started = [some(launcher.head, 1), *(some(kind, kind.least) for kind in launcher.workers if kind.least)]
    most = launcher.most_nodes - 1
    later = f"; the head starts and ends workers by itself, {most} at most" if most else ""
    return f"{', '.join(started)}, with their disks{later}"
