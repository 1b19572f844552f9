"""One structured line for each request."""

from __future__ import annotations

import logging

import msgspec

_log = logging.getLogger("dynamo.access")


class AccessLog:
    """Writes JSON lines to the logger `dynamo.access`, at INFO."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._encode = msgspec.json.Encoder().encode

    def write(
        self, request_id: str, client: str, method: str, path: str, status: int, seconds: float, first: float | None,
        pieces: int, sent: int,
    ) -> None:  # fmt: skip
        """`seconds` to the end and `first` to the first piece of answer; `pieces` written, `sent` bytes of body."""
        if not self._enabled or not _log.isEnabledFor(logging.INFO):
            return
        line = {
            "id": request_id,
            "client": client,
            "method": method,
            "path": path,
            "status": status,
            "ms": round(seconds * 1e3, 2),
            "first_ms": None if first is None else round(first * 1e3, 2),
            "pieces": pieces,
            "bytes": sent,
        }
        _log.info("%s", self._encode(line).decode())
