"""Fingerprints: what an artifact was made of, so that a second run knows what it can skip."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(**parts: Any) -> str:
    """SHA-256 over the parts as canonical JSON (sorted keys); equal parts give an equal fingerprint on any machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
