"""What a request may hold. Pure: no Ray, no HTTP library."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass

MOST_BYTES = 1 << 16
MOST_CHARACTERS = 10_000
MOST_HITS = 1000
_KEYS = ("query", "k")


class BadRequestError(ValueError):
    """A request that its sender can correct; `status` is the HTTP status of the answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class SearchRequest:
    """The body of POST /search: `{"query": "what causes hives?", "k": 10}`."""

    query: str
    k: int = 10

    @classmethod
    def parse(cls, body: bytes) -> SearchRequest:
        """BadRequestError says what was expected and what was found."""
        if len(body) > MOST_BYTES:
            raise BadRequestError(f"expected at most {MOST_BYTES} bytes, found {len(body)}", 413)
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BadRequestError(f'expected JSON such as {{"query": "...", "k": 10}}: {error}') from None
        if not isinstance(value, dict):
            raise BadRequestError(f"expected a JSON object, found {type(value).__name__}")
        unknown = sorted(set(value) - set(_KEYS))
        if unknown:
            raise BadRequestError(f"unknown key {unknown[0][:80]!r}; expected {', '.join(_KEYS)}")
        query, k = value.get("query"), value.get("k", 10)
        if not isinstance(query, str) or not query.strip():
            raise BadRequestError("query: expected a text that is not empty")
        if len(query) > MOST_CHARACTERS:
            raise BadRequestError(f"query: expected at most {MOST_CHARACTERS} characters, found {len(query)}")
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_HITS:
            raise BadRequestError(f"k: expected a whole number from 1 to {MOST_HITS}, found {json.dumps(k)[:80]}")
        return cls(query, k)


def token_digest(token: str) -> str:
    """What a server keeps instead of the token."""
    return hashlib.sha256(token.encode()).hexdigest()


def check_token(header: str | None, digest: str) -> None:
    """BadRequestError (401) unless the header is `Bearer TOKEN` with the token of this digest."""
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(token_digest(token.strip()), digest):
        raise BadRequestError("expected the header Authorization: Bearer TOKEN, with the token of this server", 401)
