"""Aggregated against disaggregated on the same cores: what long prompts do to other people's tokens.

    python -m benchmarks.disagg                              two cores, the demo model, three rounds of each mix
    python -m benchmarks.disagg --mix burst=1.5,3            another mix: 1.5 chats and 3 long prompts a second
    python -m benchmarks.disagg --json out.json              figures for a plot

Both deployments have two engines with one thread each: two Workers, or a Worker and a PrefillWorker. They take turns, a
round each, on the same requests: chat (short prompts, long answers) and long prompts, in three mixes.
Event loop and client share the cores with the engines. Times to the first token count from when a request was due.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.disagg_load import Answer, Kind, plan, quantile, run

COMMON = ("--Worker.engine-args.threads=1", "--Worker.num-kv-blocks=8192", "--log-level=error")
MODES = {
    "aggregated": ("graphs.agg", "--Worker.ServiceArgs.workers=2"),
    "disaggregated": ("graphs.disagg", "--Worker.conditional-disagg=true", "--Worker.max-prefill-queue-size=1000"),
}
MIXES = ("mixed=1.5,0.7", "chat only=4,0", "long only=0,1.8")
"""A name, chats a second, long prompts a second."""


@contextmanager
def served(mode: str, options: argparse.Namespace) -> Iterator[int]:
    """The port of a running deployment."""
    graph, *more = MODES[mode]
    if mode == "disaggregated":
        more += [f"--Worker.max-local-prefill-length={options.max_local}"]
    arguments = [*more, *COMMON, *options.option]
    command = ["taskset", "-c", options.cores, sys.executable, "-m", "dynamo", "serve", graph, "--port", "0"]
    process = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r" at http://127\.0\.0\.1:(\d+)/v1", line):
                yield int(found[1])
                break
        else:
            sys.exit(f"{mode} did not start: {' '.join([*command, *arguments])}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def figures(answers: list[Answer], seconds: float) -> dict[str, float]:
    """Everything about one mode; milliseconds, and requests a second."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(answer.kind.name for answer in answers):
        mine = [answer for answer in answers if answer.kind.name == name]
        spoken = [answer for answer in mine if answer.pieces and answer.failed is None]
        first = [answer.ttft for answer in spoken]
        gaps = [gap for answer in spoken for gap in answer.gaps] or [0.0]
        found |= {
            f"{name} TTFT p50 ms": quantile(first, 0.5) * 1e3,
            f"{name} TTFT p99 ms": quantile(first, 0.99) * 1e3,
            f"{name} ITL p50 ms": quantile(gaps, 0.5) * 1e3,
            f"{name} ITL p99 ms": quantile(gaps, 0.99) * 1e3,
            f"{name} ITL worst ms": max(gaps) * 1e3,
            f"{name} goodput req/s": sum(answer.good for answer in mine) / seconds,
            f"{name} good %": 100 * sum(answer.good for answer in mine) / len(mine),
            f"{name} failed": float(len(mine) - len(spoken)),
        }
    return found


def report(mix: str, columns: dict[str, dict[str, float]]) -> None:
    """A table, one row a figure."""
    aggregated, disaggregated = columns["aggregated"], columns["disaggregated"]
    print(f"{mix:26} {'aggregated':>12} {'disaggregated':>14} {'ratio':>7}")
    for name, before in aggregated.items():
        after = disaggregated[name]
        ratio = f"{after / before:.2f}" if before else "-"
        print(f"{name:26} {before:12.1f} {after:14.1f} {ratio:>7}")
    print(flush=True)


def compare(ports: dict[str, int], kinds: list[Kind], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The figures of every mode on one mix."""
    found: dict[str, list[Answer]] = {mode: [] for mode in MODES}
    for number in range(options.rounds):
        for mode, port in ports.items():
            found[mode] += asyncio.run(run(port, plan(kinds, options.seconds, number + 1)))
    return {mode: figures(answers, options.seconds * options.rounds) for mode, answers in found.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", default="0,1", help="cores of the deployment, as taskset takes them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="of a round")
    parser.add_argument("--mix", action="append", help="NAME=CHATS,LONG in requests a second; may be repeated")
    parser.add_argument("--chat-prompt", type=int, default=40)
    parser.add_argument("--chat-output", type=int, default=150)
    parser.add_argument("--long-prompt", type=int, default=3000)
    parser.add_argument("--long-output", type=int, default=10)
    parser.add_argument("--max-local", type=int, default=256, help="max-local-prefill-length")
    parser.add_argument("--ttft", type=float, default=0.5, help="objective of chat, seconds")
    parser.add_argument("--long-ttft", type=float, default=5.0, help="objective of long prompts, seconds")
    parser.add_argument("--gap", type=float, default=0.05, help="objective between tokens, seconds")
    parser.add_argument("--option", action="append", default=[], help="passed to dynamo serve, for both")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()

    def kinds(chats: float, longs: float) -> list[Kind]:
        return [
            Kind("chat", chats, options.chat_prompt, options.chat_output, options.ttft, options.gap),
            Kind("long", longs, options.long_prompt, options.long_output, options.long_ttft, 1.0),
        ]

    everything: dict[str, object] = {"options": vars(options)}
    with ExitStack() as stack:
        ports = {mode: stack.enter_context(served(mode, options)) for mode in MODES}
        for port in ports.values():  # warm up
            asyncio.run(run(port, plan(kinds(1.5, 0.7), 2.0, 0)))
        for mix in options.mix or MIXES:
            name, _, rates = mix.partition("=")
            chats, longs = map(float, rates.split(","))
            columns = compare(ports, kinds(chats, longs), options)
            report(name, columns)
            everything[name] = columns
    if options.json:
        Path(options.json).write_text(json.dumps(everything, indent=2))


if __name__ == "__main__":
    main()
