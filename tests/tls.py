"""Certificates by openssl, as SECURITY.md makes them."""

from __future__ import annotations

import subprocess
from pathlib import Path


def authority(folder: Path, name: str) -> tuple[str, str]:
    """A certificate authority: (certificate, key)."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN={name} -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return str(certificate), str(key)


def signed(folder: Path, name: str, ca: str, ca_key: str, *addresses: str) -> tuple[str, str]:
    """(certificate, key) of a machine with these addresses, signed by the authority."""
    certificate, key, request = (folder / f"{name}.{ending}" for ending in ("pem", "key", "csr"))
    command = f"openssl req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {key} -out {request}"
    subprocess.run(command.split(), check=True, capture_output=True)
    (folder / f"{name}.ext").write_text("subjectAltName=" + ",".join(f"IP:{a}" for a in addresses) + "\n")
    command = f"openssl x509 -req -in {request} -CA {ca} -CAkey {ca_key} -CAcreateserial -days 1 -out {certificate}"
    subprocess.run([*command.split(), "-extfile", str(folder / f"{name}.ext")], check=True, capture_output=True)
    key.chmod(0o600)
    return str(certificate), str(key)
