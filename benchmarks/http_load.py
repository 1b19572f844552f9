"""A lean closed-loop client for streamed chat completions: one asyncio protocol a connection, bodies made beforehand.

An ordinary client: no TCP_QUICKACK, so that a server which leaves Nagle's algorithm on shows it in the first token.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

TICKS = os.sysconf("SC_CLK_TCK")
END = b"0\r\n\r\n"
LIMIT = 120.0
"""Seconds a run may take."""


@dataclass
class Result:
    """One closed-loop run. Times are seconds."""

    requests: int = 0
    failures: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    """Of the server's processes, user and system."""
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds a request, over the whole server."""
        return self.cpu / max(1, self.requests) * 1e3

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.wall

    def first_ms(self, fraction: float = 0.5) -> float:
        """A quantile of the time to the first token, in milliseconds."""
        ordered = sorted(self.first)
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] * 1e3


def bodies(tokenizer: Path, model: str, prompt_tokens: int, output_tokens: int, count: int) -> list[bytes]:
    """Distinct streaming chat requests of words that are one token each."""
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(t[1:] for t in vocabulary if t[0] == "\u0120" and t[1:].isascii() and t[1:].isalpha() and len(t) > 2)
    chance = random.Random(1)
    made = []
    for _ in range(count):
        text = " " + " ".join(chance.choices(words, k=max(1, prompt_tokens - 10)))
        body = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        made.append(json.dumps(body, separators=(",", ":")).encode())
    return made


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of these processes so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


class _Connection(asyncio.Protocol):
    def __init__(self, run: _Run) -> None:
        self._run = run
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._next()

    def _next(self) -> None:
        body = self._run.take()
        assert self._transport is not None
        if body is None:
            self._transport.close()
            return
        self._tail = b""
        self._seen = False
        self._ok = False
        self._sent = time.perf_counter()
        self._transport.write(self._run.head % len(body) + body)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._seen and b'"content":"' in data:
            self._seen = True
            self._run.result.first.append(now - self._sent)
        data = self._tail + data
        self._ok = self._ok or b"data: [DONE]" in data
        self._tail = data[-32:]
        if data.endswith(END):
            self._run.done(self._ok, now - self._sent)
            self._next()

    def connection_lost(self, error: Exception | None) -> None:
        self._run.closed()


class _Run:
    def __init__(self, host: str, port: int, requests: list[bytes], connections: int) -> None:
        self.head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            "Accept: text/event-stream\r\n"
        ).encode() + b"Content-Length: %d\r\n\r\n"
        self.result = Result()
        self._left = list(requests)
        self._open = connections
        self._finished = asyncio.get_running_loop().create_future()

    def take(self) -> bytes | None:
        return self._left.pop() if self._left else None

    def done(self, ok: bool, seconds: float) -> None:
        self.result.requests += 1
        self.result.failures += not ok
        self.result.whole.append(seconds)

    def closed(self) -> None:
        self._open -= 1
        if self._open == 0:
            self._finished.set_result(None)

    async def wait(self) -> None:
        await self._finished


async def closed_loop(host: str, port: int, requests: list[bytes], connections: int, pids: Sequence[int]) -> Result:
    """Sends `requests` over as many connections, each waiting for its answer before the next."""
    run = _Run(host, port, requests, connections)
    loop = asyncio.get_running_loop()
    before, start = cpu_seconds(pids), time.perf_counter()
    for _ in range(connections):
        await loop.create_connection(lambda: _Connection(run), host, port)
    await asyncio.wait_for(run.wait(), LIMIT)
    run.result.wall = time.perf_counter() - start
    run.result.cpu = cpu_seconds(pids) - before
    if run.result.requests != len(requests):
        run.result.failures += len(requests) - run.result.requests
    return run.result
