"""What the HTTP surface needs of whatever answers its requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from core.messages import RequestContext
from core.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from core.openai.responses import ModelList, Text, Tokens


class Backend(Protocol):
    """A `Pipeline`, or a client of one in another process. Closing a generator early aborts its request."""

    def chat(self, request: ChatRequest, context: RequestContext) -> AsyncGenerator[bytes, None]:
        """See `Pipeline.chat`."""

    def completion(self, request: CompletionRequest, context: RequestContext) -> AsyncGenerator[bytes, None]:
        """See `Pipeline.completion`."""

    async def tokenize(self, request: TokenizeRequest) -> Tokens:
        """See `Pipeline.tokenize`."""

    async def detokenize(self, request: DetokenizeRequest) -> Text:
        """See `Pipeline.detokenize`."""

    async def models(self) -> ModelList:
        """What is served now."""

    async def check_ready(self) -> None:
        """Returns when requests can be answered. Raises `Unavailable` with the reason when they cannot."""
