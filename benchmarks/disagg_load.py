"""An open-loop client of streamed completions that keeps the time of every piece, and what it makes of them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kind:
    """One stream of requests."""

    name: str
    rate: float
    """Requests a second, at exponentially distributed intervals."""
    prompt: int
    """Tokens, different in every request."""
    output: int
    ttft: float
    """Seconds to the first token that are good enough."""
    gap: float
    """Seconds between tokens that are good enough, at the request's own 95th percentile."""


@dataclass
class Answer:
    """When a request was due, and when its pieces came. Seconds."""

    kind: Kind
    due: float
    pieces: list[float] = field(default_factory=list)
    failed: str | None = None

    @property
    def ttft(self) -> float:
        """From when it was due, so that a client that falls behind shows."""
        return self.pieces[0] - self.due

    @property
    def gaps(self) -> list[float]:
        """Between pieces."""
        return [later - earlier for earlier, later in zip(self.pieces, self.pieces[1:], strict=False)]

    @property
    def good(self) -> bool:
        """Whether it met its objectives."""
        if self.failed is not None or not self.pieces:
            return False
        return self.ttft <= self.kind.ttft and quantile(self.gaps or [0.0], 0.95) <= self.kind.gap


def quantile(values: list[float], fraction: float) -> float:
    """Of a list that is not empty."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def plan(kinds: list[Kind], seconds: float, seed: int) -> list[tuple[float, Kind, bytes]]:
    """What to send when, the same for the same seed: (seconds from the start, kind, request)."""
    chance = random.Random(seed)
    found: list[tuple[float, Kind, bytes]] = []
    for kind in kinds:
        at = chance.expovariate(kind.rate) if kind.rate else seconds
        while at < seconds:
            prompt = [chance.randrange(100, 2000) for _ in range(kind.prompt)]
            body = {"model": "demo", "prompt": prompt, "max_tokens": kind.output, "temperature": 0, "stream": True,
                    "ignore_eos": True}  # fmt: skip
            found.append((at, kind, json.dumps(body).encode()))
            at += chance.expovariate(kind.rate)
    return sorted(found, key=lambda item: item[0])


async def run(port: int, requests: list[tuple[float, Kind, bytes]]) -> list[Answer]:
    """Send everything when it is due, and wait for the last answer."""
    began = time.monotonic()

    async def one(at: float, kind: Kind, body: bytes) -> Answer:
        answer = Answer(kind, began + at)
        await asyncio.sleep(answer.due - time.monotonic())
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            status = await reader.readline()
            async for line in reader:
                if line.startswith(b"data: {"):
                    answer.pieces.append(time.monotonic())
                    if b'"error"' in line:
                        answer.failed = line.decode()
            if b" 200 " not in status:
                answer.failed = status.decode()
        finally:
            writer.close()
        return answer

    return list(await asyncio.gather(*(one(*request) for request in requests)))
