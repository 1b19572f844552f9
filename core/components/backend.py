"""What the HTTP surface calls: the Processor's endpoints, wherever the Processor runs."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from core.components.processor import Processor
from core.components.router_messages import Routed, RouteRequest, RoutersState
from core.graph import client_of
from core.messages import RequestContext
from core.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from core.openai.responses import ModelList, Text, Tokens
from core.runtime import Client


class ProcessorBackend:
    """A `core.openai.Backend` over clients of a Processor."""

    def __init__(self, processor: Processor, chat: Client | None = None) -> None:
        """`chat` replaces the client of the Processor's own chat endpoint."""
        self._chat = chat or client_of(processor.chat)
        self._completion = client_of(processor.completion)
        self._tokenize = client_of(processor.tokenize)
        self._detokenize = client_of(processor.detokenize)
        self._models = client_of(processor.models)
        self._ready = client_of(processor.ready)
        self._explain_route = client_of(processor.explain_route)
        self._routing_state = client_of(processor.routing_state)

    def chat(self, request: ChatRequest, context: RequestContext) -> AsyncGenerator[bytes, None]:
        """See `Pipeline.chat`."""
        return self._chat.stream(request, context)

    def completion(self, request: CompletionRequest, context: RequestContext) -> AsyncGenerator[bytes, None]:
        """See `Pipeline.completion`."""
        return self._completion.stream(request, context)

    async def tokenize(self, request: TokenizeRequest) -> Tokens:
        """See `Pipeline.tokenize`."""
        tokens: Tokens = await _only(self._tokenize, request)
        return tokens

    async def detokenize(self, request: DetokenizeRequest) -> Text:
        """See `Pipeline.detokenize`."""
        text: Text = await _only(self._detokenize, request)
        return text

    async def models(self) -> ModelList:
        """What is served now."""
        models: ModelList = await _only(self._models, None)
        return models

    async def check_ready(self) -> None:
        """Raises `Overloaded` (or its `Unavailable`) when no Processor, or no worker behind it, is live."""
        await _only(self._ready, None)

    async def explain_route(self, request: RouteRequest) -> Routed:
        """Where a Router would send a prompt now, and why. Raises `RequestRejected` in a graph without one."""
        routed: Routed = await _only(self._explain_route, request)
        return routed

    async def routing_state(self) -> RoutersState:
        """What the Routers know. Raises `RequestRejected` in a graph without one."""
        state: RoutersState = await _only(self._routing_state, None)
        return state


async def _only(client: Client, request: Any) -> Any:
    """The one item of an endpoint that gives one."""
    async with aclosing(client.stream(request, RequestContext(request_id=uuid.uuid4().hex))) as items:
        return await anext(items)
