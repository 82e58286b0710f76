"""What `--cluster TARGET` names: this process, a Ray to join, a dashboard that takes jobs, or a launcher's YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ckd_ray.errors import UserError
from ckd_ray.ray_util.sockets import LOOPBACK

Kind = Literal["local", "address", "dashboard", "launcher"]
EXPECTED = "local, a Ray address (HOST:PORT), a dashboard (http://HOST:8265) or a cluster launcher's YAML file"


@dataclass(frozen=True)
class Target:
    """A parsed `--cluster` or TARGET; `text` is what the user gave, `kind` what it is."""

    text: str
    kind: Kind

    @property
    def remote(self) -> bool:
        """The command is sent there as a job, rather than run in this process."""
        return self.kind in ("dashboard", "launcher")

    @property
    def in_clear(self) -> bool:
        """The token would travel unencrypted over a network."""
        parts = urlsplit(self.text)
        return self.kind == "dashboard" and parts.scheme == "http" and parts.hostname not in LOOPBACK


def parse_target(text: str | None, where: str = "--cluster") -> Target | None:
    """The target, or None for a running Ray and else a local one.

    Raises:
        UserError: it is none of the four kinds, or the file is not there.
    """
    if text is None:
        return None
    if text == "local":
        return Target(text, "local")
    if text.startswith(("http://", "https://")):
        return Target(_dashboard(text, where), "dashboard")
    if text.endswith((".yaml", ".yml")):
        if not Path(text).is_file():
            raise UserError("this file does not exist", where=f"{where} {text}", expected="a cluster launcher's YAML")
        return Target(text, "launcher")
    if text == "auto" or text.startswith("ray://") or re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s/:]+):\d{1,5}", text):
        return Target(text, "address")
    raise UserError("this names no cluster", where=where, expected=EXPECTED, found=text)


def parse_remote(text: str) -> Target:
    """A TARGET that holds jobs: a dashboard or a launcher's file.

    Raises:
        UserError: it is something else.
    """
    target = parse_target(text, "TARGET")
    if target is None or not target.remote:
        expected = "a dashboard (http://HOST:8265) or a cluster launcher's YAML file"
        raise UserError("no jobs are sent to this target", where="TARGET", expected=expected, found=text)
    return target


def _dashboard(text: str, where: str) -> str:
    try:
        parts = urlsplit(text)
        sound = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound or parts.path.strip("/") or parts.query or parts.fragment:
        raise UserError("not a dashboard's address", where=where, expected="http://HOST:8265", found=text)
    if parts.username or parts.password:
        raise UserError(
            "an address with a password in it ends up in logs",
            where=where,
            expected="http://HOST:8265",
            fix="the token comes from RAY_AUTH_TOKEN or ~/.ray/auth_token",
        )
    return text.rstrip("/")
