"""One HTTP request and its answer, as the ASGI application sees it."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from itertools import count
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from core.messages import DynamoError, RequestRejected
from core.openai.errors import describe, error_event, error_json, is_defect, retry_after

CONNECTION = "dynamo.connection"
"""ASGI scope extension: the connection, where the server can cut it."""

JSON = (b"content-type", b"application/json")
SSE = (b"content-type", b"text/event-stream; charset=utf-8")

_CLIENT_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_PREFIX = secrets.token_hex(6)
_numbers = count()


class ClientGone(DynamoError):
    """The client closed its connection: nobody reads the answer."""


class ClientStalled(DynamoError):
    """The client does not read what waits for it."""


class Connection(Protocol):
    """What a server lets the application do with a connection."""

    def cut(self) -> None:
        """Closes it at once, dropping what was not sent."""


class Exchange:
    """State of one request. Whoever watches it may end it early with `interrupt`."""

    __slots__ = (
        "_client_id", "_connection", "_task", "answered", "content_length", "content_type", "deadline",
        "explain", "first", "headers_sent", "late", "more_headers", "pieces", "reading", "reason", "receive",
        "request_id", "scope", "send", "sending", "sent", "session", "stalled", "started", "status", "streaming",
        "telling", "token", "watcher",
    )  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.started = time.monotonic()
        self._task = asyncio.current_task()
        extensions = scope.get("extensions")
        self._connection: Connection | None = extensions.get(CONNECTION) if extensions else None
        self._client_id: bytes | None = None
        self.content_length: bytes | None = None
        self.content_type: bytes | None = None
        self.token: bytes | None = None
        self.session: str | None = None
        """X-Session-Id: the conversation, for session affinity."""
        self.explain = False
        """X-Dynamo-Explain: the answer is to say where the request went, and why."""
        for name, value in scope["headers"]:
            if name == b"content-length":
                self.content_length = value
            elif name == b"content-type":
                self.content_type = value
            elif name == b"authorization":
                self.token = value
            elif name == b"x-session-id":
                self.session = value.decode("latin-1")
            elif name == b"x-dynamo-explain":
                self.explain = value.strip() not in (b"", b"0", b"false")
            elif name == b"x-request-id" and _CLIENT_ID.fullmatch(value):
                self._client_id = value
        number = next(_numbers)
        if self._client_id is None:
            self.request_id = f"{_PREFIX}{number:08x}"
        else:  # the client's id says what to look for in the log, the number keeps two of the same apart
            self.request_id = f"{self._client_id.decode()}.{_PREFIX[:4]}{number:x}"
        self.more_headers: tuple[tuple[bytes, bytes], ...] = ()
        """Of the answer, beside those that every answer has."""
        self.status = 0
        self.headers_sent = False
        self.streaming = False
        self.answered = False
        self.telling = False
        """The error that ended the request is being sent."""
        self.reading = False
        """The body is not complete yet."""
        self.sending = False
        self.pieces = 0
        """Body messages handed to the server."""
        self.sent = 0
        """Bytes of body."""
        self.first: float | None = None
        self.deadline = float("inf")
        """`time.monotonic()` after which `late` ends the request."""
        self.late: DynamoError | None = None
        self.reason: DynamoError | None = None
        self.watcher: asyncio.Task[None] | None = None
        self.stalled: tuple[int, float] | None = None
        """The watch's own: pieces sent, and since when no more, while one waits to be sent."""

    def interrupt(self, reason: DynamoError) -> None:
        """Ends the request: its handler is woken at once, whatever it waits for. Only the first reason counts, until
        the error is being told: what a handler does in between frees the engine and must not be disturbed."""
        if self._task is not None and not self.answered and (self.reason is None or self.telling):
            self.reason = reason
            self._task.cancel()

    def recover(self) -> DynamoError | None:
        """In the handler, after `CancelledError`: the reason when `interrupt` was it, None when the task itself is to
        end."""
        if self.reason is not None and self._task is not None:
            self._task.uncancel()
        return self.reason

    @property
    def shown_id(self) -> bytes:
        """The id for the answer's X-Request-Id: the client's own, where it sent one."""
        return self._client_id or self.request_id.encode()

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises `RequestRejected` when it is larger than `limit` bytes, `ClientGone` when it stops."""
        declared = self.content_length
        if declared is not None and declared.isdigit() and int(declared) > limit:
            raise _too_large(f"{int(declared)} bytes", limit)
        message = await self.receive()
        parts: list[bytes] = []
        size = 0
        while True:
            if message["type"] == "http.disconnect":
                raise ClientGone("the client left before its request was complete")
            part: bytes = message.get("body", b"")
            if not message.get("more_body", False) and not parts:
                if len(part) > limit:
                    raise _too_large("more", limit)
                return part
            parts.append(part)
            size += len(part)
            if size > limit:
                raise _too_large("more", limit)
            if not message.get("more_body", False):
                return b"".join(parts)
            message = await self.receive()

    async def start(self, status: int, *headers: tuple[bytes, bytes]) -> None:
        """Sends the head of the answer."""
        self.status = status
        self.headers_sent = True
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, *self.more_headers, (b"x-request-id", self.shown_id)],
            }
        )

    async def piece(self, body: bytes, *, last: bool) -> None:
        """Sends a piece of the body."""
        self.answered = last
        self.sending = True
        await self.send({"type": "http.response.body", "body": body, "more_body": not last})
        self.sending = False
        self.pieces += 1
        self.sent += len(body)

    async def answer(self, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        """Sends a complete answer."""
        await self.start(status, *headers, (b"content-length", b"%d" % len(body)))
        await self.piece(body, last=True)

    async def fail(self, error: BaseException) -> None:
        """Sends the error in the way that is still open: as an answer, or as the last event of a stream."""
        self.telling = True
        if isinstance(error, ClientGone | ClientStalled) or self.answered:
            self.status = 499
            self.cut()
            return
        status, described = describe(error)
        if not self.headers_sent:
            extra: list[tuple[bytes, bytes]] = []
            if (seconds := retry_after(error)) is not None:
                extra.append((b"retry-after", b"%d" % max(1, round(seconds))))
            if status == 401:
                extra.append((b"www-authenticate", b"Bearer"))
            if status in (408, 413):
                extra.append((b"connection", b"close"))  # the rest of the body is not worth reading
            await self.answer(status, error_json(described), JSON, *extra)
        elif self.streaming:
            self.status = status
            await self.piece(error_event(described), last=True)
        else:
            self.cut()

    def cut(self) -> None:
        """Closes the connection without another word."""
        self.answered = True
        if self._connection is not None:
            self._connection.cut()

    def is_defect(self, error: BaseException) -> bool:
        """Whether the error belongs in the log with its traceback."""
        return not isinstance(error, ClientGone | ClientStalled) and is_defect(error)

    @property
    def client(self) -> str:
        """The client's address."""
        client: Any = self.scope.get("client")
        return f"{client[0]}:{client[1]}" if client else ""


def _too_large(found: str, limit: int) -> RequestRejected:
    return RequestRejected(
        f"The body has {found}; at most {limit} bytes are accepted. Send a shorter request.", code="request_too_large"
    )
