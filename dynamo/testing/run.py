"""One request as the kit sees it: its stream, checked delta by delta, and what the stream amounted to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self, TypeVar

from dynamo import Delta, EngineInfo, EngineRequest, FinishReason, TokenLogprob

T = TypeVar("T")

SPARE_DELTAS = 4
"""Deltas without tokens that a stream may have beyond one a token, before it counts as a flood."""


class Door(Protocol):
    """Where streams come from: an engine, or two of them with what the core puts between."""

    @property
    def info(self) -> EngineInfo:
        """Facts of the engine that streams come from."""

    def decode(self, request: EngineRequest, kv: str | None = None) -> AsyncIterator[Delta]:
        """As `EngineHost.decode`."""


@dataclass
class Run:
    """What a stream amounted to."""

    request: EngineRequest
    deltas: list[Delta] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None

    @property
    def text_tokens(self) -> list[int]:
        """The tokens without the end-of-sequence or stop token that ended them."""
        return self.tokens if self.stop_token is None else self.tokens[:-1]


class Stream:
    """A running request. Every delta is checked against the contract as it comes; a late one is a failure.

    `async with Stream(door, request, timeout) as stream:` closes the iterator, whatever happened.
    """

    def __init__(self, door: Door, request: EngineRequest, timeout: float, kv: str | None = None) -> None:
        """`kv`: the session to go on from, as `EngineSpec.decode` takes it."""
        self.run = Run(request)
        self._door = door
        self._kv = kv
        self._info: EngineInfo = door.info
        self._timeout = timeout
        self._iterator: AsyncIterator[Delta] | None = None
        self._empty = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def next(self) -> Delta | None:
        """The next delta, None at the end. Raises what the engine raises, `AssertionError` for what it does wrong."""
        request = self.run.request
        if self._iterator is None:
            self._iterator = self._door.decode(request, self._kv)
        try:
            delta = await within(self._timeout, anext(self._iterator), f"a delta of request {request.request_id}")
        except StopAsyncIteration:
            assert self.run.finish is not None, (
                f"the stream ended after {len(self.run.tokens)} tokens without a terminal delta: set `finish`"
            )
            return None
        self._check(delta)
        self._add(delta)
        return delta

    async def finish(self) -> Run:
        """Reads to the end."""
        while await self.next() is not None:
            pass
        return self.run

    async def close(self) -> None:
        """Closes the iterator, as a client that has gone away does."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None and hasattr(iterator, "aclose"):
            await within(self._timeout, iterator.aclose(), "closing a stream")

    def _check(self, delta: Delta) -> None:
        run, request = self.run, self.run.request
        assert isinstance(delta, Delta), f"the stream gave {type(delta).__name__}, expected dynamo.Delta"
        assert run.finish is None, f"a delta came after the terminal one ({run.finish}): {delta}"
        wrong = [t for t in delta.token_ids if type(t) is not int or not 0 <= t < self._info.vocab_size]
        assert not wrong, f"token ids {wrong} are not plain ints within the vocabulary of {self._info.vocab_size}"
        total = len(run.tokens) + len(delta.token_ids)
        assert total <= request.stop.max_tokens, f"{total} tokens came, max_tokens is {request.stop.max_tokens}"
        if request.logprobs is None:
            assert delta.logprobs is None, "log-probabilities came that nobody asked for"
        else:
            given = [entry.token_id for entry in delta.logprobs or []]
            assert given == delta.token_ids, f"log-probabilities are of tokens {given}, the tokens {delta.token_ids}"
        if run.deltas:
            assert delta.cached_tokens is None, "cached_tokens belongs to the first delta only"
            assert delta.prompt_logprobs is None, "prompt_logprobs belong to the first delta only"
        if delta.stop_token is not None:
            assert delta.finish is FinishReason.STOP, f"stop_token is set and finish is {delta.finish}"
            assert delta.token_ids, "stop_token is set on a delta without it: it is also the last id"
            assert delta.token_ids[-1] == delta.stop_token, f"stop_token {delta.stop_token} is not the last id"
        if not delta.token_ids and delta.finish is None:
            self._empty += 1
            assert self._empty <= len(run.tokens) + SPARE_DELTAS, f"a flood: {self._empty} deltas carried no token"

    def _add(self, delta: Delta) -> None:
        run = self.run
        if not run.deltas:
            run.cached_tokens = delta.cached_tokens
            run.prompt_logprobs = delta.prompt_logprobs
        run.deltas.append(delta)
        run.tokens += delta.token_ids
        run.logprobs += delta.logprobs or []
        run.finish = delta.finish
        run.stop_token = delta.stop_token


async def within(seconds: float, awaitable: Awaitable[T], what: str) -> T:
    """The awaitable's result. Raises `AssertionError` when it takes longer."""
    try:
        async with asyncio.timeout(seconds):
            return await awaitable
    except TimeoutError as error:
        raise AssertionError(f"waited {seconds:g} s for {what} in vain (the limit is step_timeout)") from error
