"""Runs the choices of one answer on the engine and hands out their pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import NamedTuple

import msgspec

from core.messages import Delta, EngineError, EngineRequest, RequestContext
from core.observe import Metrics
from core.openai.choice import Choice
from core.openai.merge import merge
from core.openai.responses import PromptTokensDetails, Usage
from core.openai.writers import DONE, StreamHead

Generate = Callable[[EngineRequest, RequestContext], AsyncGenerator[Delta, None]]
"""Starts one sequence. Closing the generator early aborts it and frees what it held."""

_HEADER_ROOM = 6_000
"""Bytes of explained decisions: proxies commonly take 8 KiB of headers."""
_GOLDEN = 0x9E3779B97F4A7C15


class Job(NamedTuple):
    """One choice and the engine request that fills it."""

    choice: Choice
    request: EngineRequest


class Answer:
    """All choices of one request. `stream` or `collect`, once."""

    def __init__(
        self, generate: Generate, context: RequestContext, metrics: Metrics | None, *, choices_per_prompt: int
    ) -> None:
        self._generate = self._noting(generate) if context.explain else generate
        self._decisions: list[bytes] = []
        self._context = context
        self._metrics = metrics
        self._per_prompt = choices_per_prompt
        self.jobs: list[Job] = []

    async def stream(self, head: StreamHead, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """Server-sent events; the last item ends with `data: [DONE]`."""
        try:
            if len(self.jobs) == 1:
                choice = self.jobs[0].choice
                async with aclosing(self._run(self.jobs[0])) as pieces:
                    async for piece in pieces:
                        if choice.finished:  # one write for the end of the text, its reason, the usage and the mark
                            break
                        yield piece
                yield piece + (head.usage(self.usage()) if include_usage else b"") + DONE
            else:
                async with aclosing(merge([self._run(job) for job in self.jobs])) as pieces:
                    async for piece in pieces:
                        yield piece
                yield (head.usage(self.usage()) if include_usage else b"") + DONE
        finally:
            self._count()

    async def collect(self) -> None:
        """Runs all choices to their end."""
        try:
            streams = [self._run(job) for job in self.jobs]
            async with aclosing(streams[0] if len(streams) == 1 else merge(streams)) as pieces:
                async for _ in pieces:
                    pass
        finally:
            self._count()

    async def explained(self, pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The routing decisions made until the first piece, as a JSON list for a header; then the pieces."""
        async with aclosing(pieces):
            first = await anext(pieces)
            yield self.decisions()
            yield first
            async for piece in pieces:
                yield piece

    def decisions(self) -> bytes:
        """The routing decisions so far, as a JSON list."""
        shown: list[bytes] = []
        room = _HEADER_ROOM
        for decision in self._decisions:
            room -= len(decision)
            if room < 0:
                break
            shown.append(decision)
        left = len(self._decisions) - len(shown)
        return b"[" + b",".join([*shown, b'{"omitted":%d}' % left] if left else shown) + b"]"

    def _noting(self, generate: Generate) -> Generate:
        async def noting(request: EngineRequest, context: RequestContext) -> AsyncGenerator[Delta, None]:
            async with aclosing(generate(request, context)) as deltas:
                async for delta in deltas:
                    if delta.decision is not None:
                        self._decisions.append(delta.decision)
                    yield delta

        return noting

    def usage(self) -> Usage:
        """Tokens so far."""
        prompts = self.jobs[:: self._per_prompt]
        prompt = sum(len(job.request.token_ids) for job in prompts)
        cached = sum(job.choice.cached_tokens for job in prompts)
        output = sum(job.choice.tokens for job in self.jobs)
        return Usage(prompt, output, prompt + output, PromptTokensDetails(cached))

    async def _run(self, job: Job) -> AsyncGenerator[bytes, None]:
        """One choice's pieces. Its last piece is handed out when the engine has let go of the request."""
        choice, request = job
        last: bytes | None = None
        async with aclosing(self._generate(request, self._context)) as deltas:
            async for delta in deltas:
                if last is not None:
                    raise EngineError("The engine went on after the end of a sequence.")
                piece = choice.push(delta)
                if choice.finished:
                    last = piece
                    if delta.finish is None:
                        break  # a stop string: the engine knows nothing of it and would go on
                elif piece:
                    yield piece
        if last is None:
            raise EngineError("The engine ended a sequence without saying why; send the request again.")
        yield last

    def _count(self) -> None:
        if self._metrics is None:
            return
        usage = self.usage()
        self._metrics.tokens(usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens)
        for job in self.jobs:
            self._metrics.finished(job.choice.reason or "aborted")


def fan_out(request: EngineRequest, n: int) -> list[EngineRequest]:
    """The same request `n` times, with ids and seeds of their own; the first keeps the client's seed."""
    if n == 1:
        return [request]
    copies = []
    for i in range(n):
        sampling = request.sampling
        if sampling.seed is not None and i:
            sampling = msgspec.structs.replace(sampling, seed=(sampling.seed + i * _GOLDEN) % 2**63)
        copies.append(msgspec.structs.replace(request, request_id=f"{request.request_id}-{i}", sampling=sampling))
    return copies
