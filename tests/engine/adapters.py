"""Adapters for tests: one that keeps the contract, to be broken one way at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from core.engine import Adapter, EngineRegistry, Source, hookimpl
from core.messages import (
    Capabilities,
    Delta,
    EngineConfig,
    EngineDescription,
    EngineInfo,
    EngineRequest,
    FinishReason,
    Load,
    Role,
    StopConditions,
)

SOURCE = Source("plain", "plain-package")
CONFIG = EngineConfig(model="models/plain")


class Plain:
    """The least that an engine can be. It notes which hooks were called."""

    capabilities = Capabilities()
    about: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.seen: list[EngineRequest] = []
        self.running = 0
        self.go = asyncio.Event()
        self.go.set()

    @hookimpl
    def describe_engine(self) -> EngineDescription:
        fields = {"name": "plain", "summary": "The least there is", "capabilities": self.capabilities}
        return EngineDescription(**(fields | self.about))

    @hookimpl
    async def start_engine(self, config: EngineConfig, role: Role) -> EngineInfo:
        self.calls.append("start")
        return EngineInfo(vocab_size=100, max_model_len=16, eos_token_ids=(0,))

    @hookimpl
    async def decode(self, request: EngineRequest, kv: str | None) -> AsyncIterator[Delta]:
        self.seen.append(request)
        self.running += 1
        try:
            await self.go.wait()
            yield Delta([1], finish=FinishReason.LENGTH)
        finally:
            self.running -= 1

    @hookimpl
    async def abort(self, request_id: str) -> None:
        self.calls.append("abort")

    @hookimpl
    def load(self) -> list[Load]:
        return [Load(running=self.running, waiting=0)]

    @hookimpl
    async def stop_engine(self) -> None:
        self.calls.append("stop")


def registered(kind: type) -> Adapter:
    """The adapter as a registry hands it out."""
    return EngineRegistry(()).add(kind, SOURCE)


def described(**about: Any) -> type:
    """`Plain` with another description."""
    return type("Described", (Plain,), {"about": about})


def capable(**capabilities: Any) -> type:
    """`Plain` that declares more."""
    return type("Capable", (Plain,), {"capabilities": Capabilities(**capabilities)})


def request(tokens: list[int] | None = None, max_tokens: int = 4, **fields: Any) -> EngineRequest:
    """A request that `Plain` serves."""
    prompt = [1, 2, 3] if tokens is None else tokens
    return EngineRequest(request_id="r", token_ids=prompt, stop=StopConditions(max_tokens=max_tokens), **fields)


async def tokens_of(stream: AsyncIterator[Delta]) -> list[int]:
    """Reads a stream to its end."""
    return [token async for delta in stream for token in delta.token_ids]
