"""The token that Ray demands of everybody who wants to run code on a cluster."""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path


def token_file() -> Path:
    """Where Ray looks for the token of this user."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def has_token() -> bool:
    """A token is in the environment or in its file."""
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or token_file().exists()


def use_token() -> None:
    """Switch token authentication on where there is a token; to be called before this process uses Ray.

    Joining does not switch it on by itself, while a head that finds a token demands it; a head without authentication
    does not mind.
    """
    if has_token() and "RAY_AUTH_MODE" not in os.environ:
        demand_token()


def demand_token() -> None:
    """Switch token authentication on in this process, in a Ray that is imported already too."""
    os.environ["RAY_AUTH_MODE"] = "token"
    if "ray" in sys.modules:  # a program has imported it, and it has read the environment then
        from ray._raylet import Config  # type: ignore[attr-defined, unused-ignore]

        Config.initialize("")


def keep_private(path: Path | None = None) -> None:
    """Ray writes the token so that everybody on the machine can read it."""
    path = path or token_file()
    with suppress(OSError):
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


def ensure_token(path: Path) -> bool:
    """Make sure that `path` holds a token that only its owner can read. Returns whether a new one was made."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        keep_private(path)
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return True
