"""What benchmarks/routing.py plays: conversations that grow, and a recorded trace scaled down."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

VOCABULARY = range(3, 3000)
"""Token ids that mean something to the demo model and end nothing."""
TRACE_BLOCK = 512
"""Tokens that one of a trace's `hash_ids` stands for."""


@dataclass(slots=True)
class Turn:
    """One request. `conversation`: its earlier turns and their answers come before `tokens` in the prompt."""

    at: float
    """Seconds from the start; later, when the conversation's last answer is not there yet."""
    conversation: int | None
    tokens: list[int]
    output: int


@dataclass
class Workload:
    """Turns in the order of their times, and what the workers' caches are to hold."""

    name: str
    turns: list[Turn]
    blocks: int
    """KV blocks of one worker."""
    seconds: float
    note: str
    slice_seconds: float = field(default=10.0)
    """Arms take turns with slices of this length."""


def conversations(
    *,
    workers: int,
    count: int,
    turns: int,
    prompt: int,
    output: int,
    room: float,
    seconds: float,
    block: int,
    seed: int,
) -> Workload:
    """`count` conversations at once, of `turns` turns that grow to about `prompt` tokens, in random order.

    `room`: all workers' caches together, in caches that hold every conversation once.
    """
    rng = random.Random(seed)
    grown = prompt // turns
    played: list[Turn] = []
    for number in range(count):
        # Every conversation is under way nearly all the time: people think for as long as it takes.
        times = sorted(rng.uniform(0.0, seconds) for _ in range(turns))
        for at in times:
            size = max(1, round(rng.gauss(grown - output, grown / 8)))
            played.append(Turn(at, number, rng.choices(VOCABULARY, k=size), output))
    played.sort(key=lambda turn: turn.at)
    blocks = int(room * count * prompt / block / workers)
    return Workload(
        name="conversations",
        turns=played,
        blocks=blocks,
        seconds=seconds,
        note=f"{count} conversations of {turns} turns, up to {prompt} tokens, in {seconds:g} s; {workers} workers with "
        f"{blocks} KV blocks of {block} tokens each: together {room:g} times what holds every conversation once",
    )


def trace(
    path: Path, *, workers: int, minutes: float, shrink: int, speed: float, blocks: int, block: int, output_shrink: int
) -> Workload:
    """The first `minutes` of a Mooncake trace, `speed` times as fast, with lengths divided by `shrink`.

    A `hash_id` becomes `TRACE_BLOCK / shrink` tokens of its own, so that equal prefixes stay equal.
    """
    played: list[Turn] = []
    known: dict[int, list[int]] = {}
    each = TRACE_BLOCK // shrink
    with path.open() as file:
        for line in file:
            row = json.loads(line)
            if row["timestamp"] >= minutes * 60_000:
                break
            tokens: list[int] = []
            for name in row["hash_ids"]:
                if name not in known:
                    known[name] = random.Random(name).choices(VOCABULARY, k=each)
                tokens += known[name]
            del tokens[max(1, row["input_length"] // shrink) :]
            output = max(1, row["output_length"] // output_shrink)
            played.append(Turn(row["timestamp"] / 1e3 / speed, None, tokens, output))
    return Workload(
        name="trace",
        turns=played,
        blocks=blocks,
        seconds=minutes * 60 / speed,
        note=f"{len(played)} requests of the trace's first {minutes:g} minutes, {speed:g} times as fast, "
        f"prompts 1/{shrink} and outputs 1/{output_shrink} as long; {workers} workers with {blocks} KV blocks "
        f"of {block} tokens each",
        slice_seconds=20.0,
    )
