"""The built-in engine against `transformers.generate`: the same model, dtype, device and threads, greedy.

    python -m benchmarks.torch_engine [--model models/demo] [--device cpu] [--threads N] [--rounds 5]

A round generates 64 tokens behind each of 16 prompts of 256 random tokens: by the engine, all requests at once; by
`generate` on the whole batch; and by `generate` one request at a time. Then the first token of a prompt of 2,048
tokens is timed, new to the engine and repeated. Each side has a process of its own, and they take turns within a
round so that they meet the same machine; what counts are the ratios, of medians.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.torch_sides import engine_side, transformers_side

BATCH, PROMPT, OUTPUT, LONG = 16, 256, 64, 2048
TARGETS = {"loop": 3.0, "batch": 1.0, "cached": 8.0}


@contextmanager
def side(target: Any, options: argparse.Namespace) -> Iterator[Connection]:
    """A process that does one side's work: send it (what, prompts, output length), receive seconds."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(theirs, options), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(30)


def ask(connection: Connection, what: str, prompts: list[list[int]], output: int = OUTPUT) -> float:
    """Seconds that a side took."""
    connection.send((what, prompts, output))
    seconds: float = connection.recv()
    return seconds


def measure(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every round by contender, and what was measured."""
    rng = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in ("engine", "batch", "loop", "cold", "cached")}
    with side(engine_side, options) as engine, side(transformers_side, options) as transformers:
        facts = {**engine.recv(), **transformers.recv()}
        vocabulary = int(facts["vocabulary"])

        def prompts(count: int, length: int) -> list[list[int]]:
            return [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(count)]

        for number in range(options.rounds + 1):
            batch = prompts(BATCH, PROMPT)
            [long] = prompts(1, LONG)
            found = {
                "engine": ask(engine, "engine", batch),
                "batch": ask(transformers, "batch", batch),
                "loop": ask(transformers, "loop", batch),
                "cold": ask(engine, "engine", [long], 1),
                "cached": ask(engine, "engine", [long], 1),
            }
            if number:  # the first round warms both sides up
                for name, seconds in found.items():
                    times[name].append(seconds)
    return times, facts


def report(times: dict[str, list[float]], facts: dict[str, str]) -> None:
    """Prints the tables."""
    median = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{facts['model']} in {facts['dtype']} on {facts['device']}, {facts['threads']} thread(s), {facts['versions']}"
    )
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors\n")
    total = BATCH * OUTPUT
    print(f"| {BATCH} requests, {PROMPT} + {OUTPUT} tokens | tokens/s | engine is faster by | wanted |")
    print("|---|---:|---:|---:|")
    print(f"| torch engine | {total / median['engine']:.0f} | | |")
    for name, text in (("loop", "generate, one at a time"), ("batch", "generate, one batch")):
        ratio = median[name] / median["engine"]
        print(f"| {text} | {total / median[name]:.0f} | {ratio:.2f} | {TARGETS[name]:.0f} |")
    print(f"\n| first token of {LONG} | ms | faster by | wanted |")
    print("|---|---:|---:|---:|")
    print(f"| cold | {median['cold'] * 1e3:.1f} | | |")
    ratio = median["cold"] / median["cached"]
    print(f"| cached | {median['cached'] * 1e3:.1f} | {ratio:.1f} | {TARGETS['cached']:.0f} |")


def main() -> None:
    """Parses options, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/demo", help="model folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=None, help="of either side; the engine's default if left out")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    began = time.perf_counter()
    report(*measure(options))
    print(f"\n{options.rounds} rounds in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
