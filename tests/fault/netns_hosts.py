"""Hosts on one machine: Linux namespaces with an sshd each, for the real cluster launcher to work on.

A host has its own network (a veth pair to one bridge), processes, host name, `/root`, `/tmp/ray` and `/dev/shm`; all
other files are this machine's, as on a shared file system. Switching it off cuts its cable first and kills its first
process then, so that nobody is told: as when the power fails.

Needs root, the right to make namespaces, iproute2, openssh-server and rsync. By hand:

    python -m tests.fault.netns_hosts 3      # three hosts until Ctrl-C; prints how to reach them
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# What a set of hosts is called; two sets with names of their own may be there at the same time.
_NETWORK, _BRIDGE, _PREFIX = "10.78.0", "ckdbr", "ckdh"
# Where packets go that nobody gets.
_NOBODY = "02:00:00:00:00:fe"

# Runs as the first process of a host. $1: name, $2: address, $3: folder with keys, $4: the Python's own folder, which
# may be below /root, $5: options of the file system of /tmp/ray.
_FIRST_PROCESS = r"""
set -eu
name=$1 address=$2 shared=$3 python=$4 options=$5
mount --make-rprivate /
hostname "$name"
mkdir -p /run/sshd /tmp/ray
case $python in
/root/*)
  kept=$(mktemp -d)
  mount --bind "$python" "$kept"
  mount -t tmpfs -o mode=0700 tmpfs /root
  mkdir -p "$python"
  mount --move "$kept" "$python"
  rmdir "$kept"
  ;;
*) mount -t tmpfs -o mode=0700 tmpfs /root ;;
esac
mount -t tmpfs -o "$options" tmpfs /tmp/ray
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=0755 tmpfs /run/sshd
mount --bind "$shared/hosts" /etc/hosts
ip link set lo up
mkdir -m 700 /root/.ssh
install -m 600 "$shared/id.pub" /root/.ssh/authorized_keys
install -m 644 "$shared/profile" /root/.bashrc
install -m 644 "$shared/profile" /root/.bash_profile
exec /usr/sbin/sshd -D -e -p 22 -f /dev/null -h "$shared/hostkey" -o "ListenAddress=$address" -o UsePAM=no \
  -o PermitRootLogin=yes -o PasswordAuthentication=no -o PidFile=none -o StrictModes=no -o MaxSessions=50 \
  -o MaxStartups=50
"""


def missing() -> str | None:
    """Why hosts cannot be made here; None when they can."""
    if os.geteuid() != 0:
        return "needs root"
    if subprocess.run(["unshare", "-n", "-m", "-p", "--fork", "true"], capture_output=True).returncode:
        return "namespaces are not allowed here"
    if Path(sys.prefix).is_relative_to("/root"):
        return "this Python environment is below /root, of which every host has its own"
    needed = {"ip": "iproute2", "rsync": "rsync", "ssh": "openssh-client", "/usr/sbin/sshd": "openssh-server"}
    return next((f"needs {package}" for program, package in needs_of(needed)), None)


def needs_of(needed: dict[str, str]) -> list[tuple[str, str]]:
    """The programs that are not there, with their packages."""
    return [(program, package) for program, package in needed.items() if shutil.which(program) is None]


class Hosts:
    """`count` hosts, named ckdh1, ckdh2, ...; a context manager.

    Args:
        folder: for keys and logs.
        path: what a login shell finds first on its PATH.
        on: how many of them are switched on at first; all when None.
        network, bridge, prefix: the names of this set of hosts.
        disk: the size of a host's /tmp/ray, such as 256m; all of the memory when empty.

    Attributes:
        gateway: the address of this machine in the hosts' network.
    """

    def __init__(
        self,
        count: int,
        folder: Path,
        path: str,
        *,
        on: int | None = None,
        network: str = _NETWORK,
        bridge: str = _BRIDGE,
        prefix: str = _PREFIX,
        disk: str = "",
    ) -> None:
        self.folder, self.names = folder, [f"{prefix}{i + 1}" for i in range(count)]
        self.addresses = {name: f"{network}.{11 + i}" for i, name in enumerate(self.names)}
        self.gateway, self._bridge, self._on = f"{network}.1", bridge, count if on is None else on
        self._disk = "mode=1777" + (f",size={disk}" if disk else "")
        self.key = folder / "id"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._profile = (
            f"export PATH={path}:$PATH HF_HUB_OFFLINE=1 RAY_worker_niceness=0 RAY_raylet_start_wait_time_s=300\n"
        )

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_network()
        for name in ("id", "hostkey"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        (self.folder / "profile").write_text(self._profile)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self.gateway}/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        try:
            for name in self.names[: self._on]:
                self.switch_on(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._processes):
            self.switch_off(name)
        self._remove_network()

    def switch_on(self, name: str) -> None:
        """Start the host, and wait for its sshd."""
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", f"{name}o", "type", "veth", "peer", "name", f"{name}i")
        _run("ip", "link", "set", f"{name}i", "netns", name)
        _run("ip", "link", "set", f"{name}o", "master", self._bridge, "up")
        _run("ip", "-n", name, "addr", "add", f"{self.addresses[name]}/24", "dev", f"{name}i")
        _run("ip", "-n", name, "link", "set", f"{name}i", "up")
        command = ["ip", "netns", "exec", name, "unshare", "-m", "-p", "-u", "-i", "--fork", "--kill-child"]
        command += ["--mount-proc", "bash", "-c", _FIRST_PROCESS, "bash", name, self.addresses[name]]
        base = str(Path(sys.base_prefix).resolve())
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*command, str(self.folder), base, self._disk],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
            )
        deadline = time.monotonic() + 30
        while subprocess.run(self.ssh(name, "true"), capture_output=True).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: {(self.folder / f'{name}.log').read_text()}")
            time.sleep(0.2)

    def switch_off(self, name: str) -> None:
        """Cut the cable, then kill all that runs on the host."""
        process = self._processes.pop(name)
        subprocess.run(["ip", "link", "set", f"{name}o", "down"], capture_output=True)
        # `unshare --kill-child` takes the host's first process along, and that one all others of its namespace.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._remove(name)

    def is_on(self, name: str) -> bool:
        """Whether the host has power."""
        return name in self._processes

    def first_process(self, name: str) -> int:
        """The number, on this machine, of the host's first process."""
        parent = self._processes[name].pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def files(self, name: str) -> Path:
        """The root of the host's files."""
        return Path(f"/proc/{self.first_process(name)}/root")

    def inside(self, name: str, *command: str) -> list[str]:
        """The command line that runs `command` on the host as a child of a process here."""
        return ["nsenter", "-t", str(self.first_process(name)), "-m", "-n", "-p", "-u", "-i", "--", *command]

    def cut(self, name: str) -> None:
        """Pull out the host's cable: nothing comes or goes, and nobody is told."""
        _run("ip", "link", "set", f"{name}o", "down")

    def plug_in(self, name: str) -> None:
        """Put the cable back."""
        _run("ip", "link", "set", f"{name}o", "up")

    def cut_gateway(self, name: str) -> None:
        """What the host sends to this machine is lost from here on; what it sends to other hosts is not."""
        neighbour = ("replace", self.gateway, "lladdr", _NOBODY, "nud", "permanent", "dev", f"{name}i")
        _run("ip", "-n", name, "neigh", *neighbour)

    def join_gateway(self, name: str) -> None:
        """End `cut_gateway`."""
        _run("ip", "-n", name, "neigh", "del", self.gateway, "dev", f"{name}i")

    def ssh(self, name: str, command: str) -> list[str]:
        """The command line that runs `command` on the host."""
        options = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=3"]
        flags = [part for option in options for part in ("-o", option)]
        return ["ssh", "-i", str(self.key), *flags, f"root@{self.addresses[name]}", command]

    def _remove(self, name: str) -> None:
        subprocess.run(["ip", "link", "del", f"{name}o"], capture_output=True)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def _remove_network(self) -> None:
        for name in self.names:
            self._remove(name)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def main() -> None:
    reason = missing()
    if reason is not None:
        sys.exit(reason)
    with (
        tempfile.TemporaryDirectory() as folder,
        Hosts(int(sys.argv[1]), Path(folder), str(Path(sys.executable).parent)) as hosts,
    ):
        for name in hosts.names:
            print(" ".join(hosts.ssh(name, "hostname")), flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
