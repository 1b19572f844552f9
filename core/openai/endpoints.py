"""The ASGI endpoints: objects called with (scope, receive, send), with nothing between them and the server."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Generic, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from core.messages import DeadlineExceeded, Overloaded, RequestContext, RequestRejected
from core.observe import AccessLog, Metrics
from core.openai.auth import ApiKeys
from core.openai.bodies import BodyDecoder
from core.openai.exchange import JSON, SSE, Exchange
from core.openai.protocol import ChatRequest, CompletionRequest
from core.openai.settings import HttpSettings
from core.openai.watch import Watch
from core.openai.writers import DONE

log = logging.getLogger(__name__)

T = TypeVar("T")
G = TypeVar("G", bound=ChatRequest | CompletionRequest)

PLAIN = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
HTML = (b"content-type", b"text/html; charset=utf-8")
DECISION = b"x-dynamo-decision"
"""On answers to requests with X-Dynamo-Explain: a JSON list, one decision a choice."""
_EVENTS = (SSE, (b"cache-control", b"no-cache"))


class Surroundings(msgspec.Struct, frozen=True):
    """What all endpoints of an application share."""

    settings: HttpSettings
    metrics: Metrics
    watch: Watch
    keys: ApiKeys
    access: AccessLog


class Endpoint(ABC):
    """Serves one path: watches, measures, and turns whatever is raised into OpenAI's error object."""

    def __init__(self, path: str, around: Surroundings, *, open_to_all: bool = False) -> None:
        self.path = path
        self._around = around
        self._open = open_to_all

    @abstractmethod
    async def serve(self, exchange: Exchange) -> None:
        """Answers the request, or raises."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        exchange = Exchange(scope, receive, send)
        around = self._around
        around.watch.enter(exchange)
        try:
            try:
                if not self._open:
                    around.keys.check(exchange.token)
                    if len(around.watch.active) > around.settings.max_requests:
                        raise Overloaded(
                            f"The server answers {around.settings.max_requests} requests already; try again soon."
                        )
                await self.serve(exchange)
            except asyncio.CancelledError:
                reason = exchange.recover()
                if reason is None:
                    raise
                await exchange.fail(reason)
            except Exception as error:
                if exchange.is_defect(error):
                    log.exception("Request %s failed", exchange.request_id)
                await exchange.fail(error)
        except asyncio.CancelledError:  # again, while the error was being told
            if exchange.recover() is None:
                raise
            exchange.cut()
        finally:
            around.watch.leave(exchange)
            self._account(exchange)

    def _account(self, exchange: Exchange) -> None:
        around = self._around
        seconds = time.monotonic() - exchange.started
        around.metrics.request(self.path, exchange.status)
        if not self._open:
            around.metrics.duration.observe(seconds)
        first = None if exchange.first is None else exchange.first - exchange.started
        around.access.write(
            exchange.request_id, exchange.client, exchange.scope["method"], self._logged(exchange), exchange.status,
            seconds, first, exchange.pieces, exchange.sent,
        )  # fmt: skip

    def _logged(self, exchange: Exchange) -> str:
        """The path in the access log."""
        return self.path


class Read(Endpoint):
    """Answers without a body to read."""

    def __init__(
        self,
        path: str,
        around: Surroundings,
        answer: Callable[[Exchange], Awaitable[tuple[int, bytes]]],
        *,
        open_to_all: bool = False,
        content_type: tuple[bytes, bytes] = JSON,
    ) -> None:
        """`answer` gives status and body."""
        super().__init__(path, around, open_to_all=open_to_all)
        self._answer = answer
        self._content_type = content_type

    async def serve(self, exchange: Exchange) -> None:
        """See `Endpoint`."""
        status, body = await self._answer(exchange)
        await exchange.answer(status, body, self._content_type)


class NoPath(Endpoint):
    """Answers paths that are not there. Its own path names them all in metrics, whose labels must stay few."""

    async def serve(self, exchange: Exchange) -> None:
        """See `Endpoint`."""
        raise RequestRejected(f"There is no path '{self._logged(exchange)}'; /docs lists them.", code="not_found")

    def _logged(self, exchange: Exchange) -> str:
        path: str = exchange.scope["path"]
        return path[:200]


class WrongMethod(Endpoint):
    """Answers methods that a path does not take."""

    def __init__(self, path: str, around: Surroundings, allowed: list[str]) -> None:
        super().__init__(path, around, open_to_all=True)
        self._allowed = ", ".join([*allowed, "HEAD"] if "GET" in allowed else allowed)

    async def serve(self, exchange: Exchange) -> None:
        """See `Endpoint`."""
        exchange.more_headers = ((b"allow", self._allowed.encode()),)
        raise RequestRejected(
            f"'{exchange.scope['path'][:200]}' does not take {exchange.scope['method'][:20]}; use {self._allowed}.",
            code="method_not_allowed",
        )


class _WithBody(Endpoint, Generic[T]):
    def __init__(self, path: str, around: Surroundings, type_: type[T]) -> None:
        super().__init__(path, around)
        self._decoder = BodyDecoder(type_)

    async def _read(self, exchange: Exchange) -> T:
        kind = exchange.content_type
        if kind is not None and not kind.startswith(b"application/json"):
            media = kind.partition(b";")[0].strip().lower()
            if media != b"application/json" and not (media.startswith(b"application/") and media.endswith(b"+json")):
                raise RequestRejected(
                    f"The body is of type '{media[:80].decode('latin-1')}'; send JSON with "
                    "'Content-Type: application/json'.",
                    code="unsupported_media_type",
                )
        settings = self._around.settings
        exchange.reading = True
        exchange.deadline = exchange.started + settings.header_timeout
        exchange.late = RequestRejected(
            f"The body was not complete after {settings.header_timeout:g} seconds; send it faster.",
            code="request_timeout",
        )
        raw = await exchange.body(settings.max_body_size)
        exchange.reading = False
        exchange.deadline = exchange.started + settings.request_timeout
        exchange.late = DeadlineExceeded(
            f"The answer was not complete within {settings.request_timeout:g} seconds; ask for fewer tokens."
        )
        return self._decoder.decode(raw)


class Call(_WithBody[T]):
    """Answers a body with one struct."""

    def __init__(
        self, path: str, around: Surroundings, type_: type[T], answer: Callable[[T], Awaitable[msgspec.Struct]]
    ) -> None:
        super().__init__(path, around, type_)
        self._answer = answer

    async def serve(self, exchange: Exchange) -> None:
        """See `Endpoint`."""
        result = await self._answer(await self._read(exchange))
        await exchange.answer(200, msgspec.json.encode(result), JSON)


class Generation(_WithBody[G]):
    """Answers with generated text, streamed or whole."""

    def __init__(
        self,
        path: str,
        around: Surroundings,
        type_: type[G],
        answer: Callable[[G, RequestContext], AsyncGenerator[bytes, None]],
    ) -> None:
        super().__init__(path, around, type_)
        self._answer = answer

    async def serve(self, exchange: Exchange) -> None:
        """See `Endpoint`."""
        request = await self._read(exchange)
        context = RequestContext(
            request_id=exchange.request_id,
            deadline=exchange.deadline,
            session=exchange.session or request.prompt_cache_key or request.user,
            priority=request.priority or 0,
            explain=exchange.explain,
        )
        metrics = self._around.metrics
        metrics.in_flight.inc()
        try:
            async with aclosing(self._answer(request, context)) as items:
                if context.explain:
                    exchange.more_headers = ((DECISION, await anext(items)),)
                await (self._stream if request.stream else self._whole)(exchange, items)
        finally:
            metrics.in_flight.dec()

    async def _whole(self, exchange: Exchange, items: AsyncGenerator[bytes, None]) -> None:
        async for body in items:
            exchange.first = time.monotonic()
            await exchange.answer(200, body, JSON)

    async def _stream(self, exchange: Exchange, items: AsyncGenerator[bytes, None]) -> None:
        """The head goes out with the first piece: until then an error still has its own status."""
        now = time.monotonic
        send = exchange.send
        times: list[float] = []
        try:
            async for item in items:
                times.append(now())
                if exchange.first is None:
                    exchange.first = times[0]
                    self._around.metrics.time_to_first_token.observe(times[0] - exchange.started)
                    exchange.streaming = True
                    await exchange.start(200, *_EVENTS)
                last = item.endswith(DONE)
                exchange.answered = last
                exchange.sending = True
                await send({"type": "http.response.body", "body": item, "more_body": not last})
                exchange.sending = False
                exchange.pieces += 1
                exchange.sent += len(item)
        finally:
            if times:
                self._around.metrics.inter_token.observe_gaps(times)
