"""Checks of the certificates, where Ray's TLS is on (SECURITY.md)."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Iterator

from ckd_ray.doctor.check import Check

_TLS = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def transport_encryption() -> Iterator[Check]:
    """The three files of RAY_USE_TLS, and whether machines with the same files trust this one."""
    if os.environ.get("RAY_USE_TLS") not in ("1", "true", "True"):
        yield Check("tls", "ok", "off (RAY_USE_TLS); the token travels unencrypted between machines")
        return
    missing = [name for name in _TLS if not os.path.isfile(os.environ.get(name, ""))]
    if missing:
        found = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in missing)
        yield Check("tls", "fail", f"no such file: {found}", "SECURITY.md shows how to make the certificates")
        return
    certificate, key, authority = (os.environ[name] for name in _TLS)
    if stat.S_IMODE(os.stat(key).st_mode) & 0o077:
        yield Check("tls", "fail", f"{key}: others can read it", f"chmod 600 {key}")
        return
    from ray.util import get_node_ip_address

    address = get_node_ip_address()
    problem = handshake(certificate, key, authority, address)
    if problem:
        fix = f"make a new certificate that names IP:{address} and is signed by {authority} (SECURITY.md)"
        yield Check("tls", "fail", problem, fix)
    else:
        yield Check("tls", "ok", f"{certificate} is good for {address}")


def handshake(certificate: str, key: str, authority: str, address: str) -> str | None:
    """A TLS connection in memory whose sides check each other's certificate. None, or what went wrong."""
    try:
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for context in (server, client):
            context.load_cert_chain(certificate, key)
            context.load_verify_locations(authority)
            context.verify_mode = ssl.CERT_REQUIRED
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [
            client.wrap_bio(to_client, to_server, server_hostname=address),
            server.wrap_bio(to_server, to_client, server_side=True),
        ]
        for _ in range(10):
            for end in list(ends):
                try:
                    end.do_handshake()
                    ends.remove(end)
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        return f"{certificate}: {error.verify_message}"
    except (ssl.SSLError, OSError) as error:
        return f"{certificate}: {error}"
    return f"{certificate}: the handshake did not end" if ends else None
