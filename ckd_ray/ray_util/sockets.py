"""Whether a program listens on an address, before something waits for it for minutes."""

from __future__ import annotations

import socket

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def knock(address: str) -> bool:
    """Connect to `HOST:PORT` and leave. False for other addresses (`auto`, ray://...), which are left to Ray.

    Raises:
        OSError: nothing listens there.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "://" in address:
        return False
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    return True


def answers(port: int) -> bool:
    """Whether a program listens on that port of this machine."""
    try:
        return knock(f"127.0.0.1:{port}")
    except OSError:
        return False
