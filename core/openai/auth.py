"""API keys."""

from __future__ import annotations

import hashlib
import hmac

from core.messages import RequestRejected


class ApiKeys:
    """Checks bearer tokens. The time that takes tells nothing about the keys."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, authorization: bytes | None) -> None:
        """Raises `RequestRejected` (401) unless the Authorization header has one of the keys, or no key is needed."""
        if not self._digests:
            return
        scheme, _, token = (authorization or b"").partition(b" ")
        given = hashlib.sha256(token.strip()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            found = "an unknown API key" if authorization else "no API key"
            raise RequestRejected(
                f"The request has {found}; send a valid one as 'Authorization: Bearer KEY'.", code="invalid_api_key"
            )
