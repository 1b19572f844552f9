"""The secret that the workers of one deployment share: it signs KV tickets and opens KV transfers."""

from __future__ import annotations

import secrets

_DRAWN = secrets.token_bytes(32)


def deployment_secret(configured: str | None) -> bytes:
    """`kv-secret` as bytes; without one a secret drawn for this process, which serves where all workers share it."""
    return _DRAWN if configured is None else configured.encode()
