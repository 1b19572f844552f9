"""uvicorn's HTTP connection with the limits that it lacks: size of the head, time to send it, a way to cut it."""

from __future__ import annotations

import time

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from core.messages import RequestRejected
from core.openai.errors import describe, error_json
from core.openai.exchange import CONNECTION

_REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class HttpConnection(HttpToolsProtocol):
    """One client's connection. asyncio and uvloop set TCP_NODELAY on it: an event leaves when it is written."""

    max_header_size = 64 * 2**10
    """Bytes before the end of a request's head; set on a subclass by the server."""

    _head_size = 0
    _in_head = True
    waiting_since: float | None = None
    """See `WatchedConnection`."""

    def connection_made(self, transport) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001  as in uvicorn
        super().connection_made(transport)
        self.waiting_since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_size += len(data)
            if self.waiting_since is None:
                self.waiting_since = time.monotonic()
        super().data_received(data)
        if self._in_head and self._head_size > self.max_header_size:
            limit = self.max_header_size
            self._refuse(431, f"The request's headers are larger than {limit} bytes; send fewer.", "headers_too_large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_size = 0
        self.waiting_since = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "This is not an HTTP request that can be read; check the client.", "invalid_http")

    def expire(self) -> None:
        """See `WatchedConnection`."""
        self.transport.close()

    def cut(self) -> None:
        """Closes the connection at once, dropping what was not sent."""
        self.transport.abort()

    def _refuse(self, status: int, message: str, code: str) -> None:
        if self.transport.is_closing():
            return
        body = error_json(describe(RequestRejected(message, code=code))[1])
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
            % (status, _REASONS[status], len(body), body)
        )
        self.transport.close()
