"""What the HTTP path costs: CPU a request of this server against the bare path, in one run on one machine.

    python -m benchmarks.http_overhead --tokenizer models/demo [--serve "dynamo serve graphs.agg --engine echo ..."]

Both servers run as processes of their own; short measurements of the two alternate, and each figure is the median
of its rounds. CPU is the server's user and system time from /proc, so that a busy machine disturbs it little. `--serve`
puts a whole deployment in the place of the library: a command that listens on `--port` and serves `--model`.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import uvloop

from benchmarks.http_load import Result, bodies, closed_loop

CASES = ((128, 32, 1, 300), (128, 32, 16, 800), (128, 32, 64, 800), (4096, 64, 1, 60), (4096, 64, 16, 120))
"""Prompt tokens, output tokens, connections, requests a round."""


class Server:
    """A server process; ended with the `with` statement."""

    def __init__(self, name: str, command: list[str], *, port: int | None = None) -> None:
        """Waits until it listens. The command prints its port first, unless `port` says it."""
        self.name = name
        self._process = subprocess.Popen(command, stdout=None if port else subprocess.PIPE, text=True)
        if port is None:
            assert self._process.stdout is not None
            self.port = int(self._process.stdout.readline())
        else:
            self.port = port
            self._wait()

    @property
    def pids(self) -> list[int]:
        """The process and everything that it started."""
        found, pending = [], [self._process.pid]
        while pending:
            pid = pending.pop()
            found.append(pid)
            pending += [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return found

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise SystemExit(f"'{self.name}' ended with code {self._process.returncode} before it served.")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise SystemExit(f"'{self.name}' did not serve within 120 seconds.")


async def measure(
    servers: list[Server], requests: dict[str, list[bytes]], connections: int, rounds: int
) -> dict[str, list[Result]]:
    """Rounds of all servers in turn."""
    results: dict[str, list[Result]] = {s.name: [] for s in servers}
    for _ in range(rounds):
        for server in servers:
            sent = requests[server.name]
            results[server.name].append(await closed_loop("127.0.0.1", server.port, sent, connections, server.pids))
    return results


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("models/demo"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the requests a round")
    parser.add_argument(
        "--access-log", action="store_true", help="our access log on (to /dev/null); off by default here"
    )
    parser.add_argument("--serve", help="command of a deployment to measure in place of the library")
    parser.add_argument("--port", type=int, default=18000, help="where that deployment listens")
    parser.add_argument("--model", default="m", help="what that deployment calls its model")
    arguments = parser.parse_args()
    base = [sys.executable, "-m", "benchmarks.http_servers"]
    tokenizer = ["--tokenizer", str(arguments.tokenizer)]
    log = ["--access-log"] if arguments.access_log else []
    names = {"deployment": arguments.model}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(Server("bare", [*base, "bare", *tokenizer])),
            stack.enter_context(Server("bare, fastokens", [*base, "bare", *tokenizer, "--fast"])),
        ]
        if arguments.serve:
            command = shlex.split(arguments.serve)
            servers.append(stack.enter_context(Server("deployment", command, port=arguments.port)))
        else:
            servers.append(stack.enter_context(Server("library", [*base, "library", *tokenizer, *log])))
            servers.append(
                stack.enter_context(Server("library, fastokens", [*base, "library", *tokenizer, "--fast", *log]))
            )
        print(
            "| prompt/output | connections | server | CPU ms/request "
            "| x bare | x bare, fastokens | req/s | TTFT p50 ms |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for prompt, output, connections, count in CASES:
            number = max(connections, int(count * arguments.scale))
            sent = {
                s.name: bodies(arguments.tokenizer, names.get(s.name, "m"), prompt, output, number) for s in servers
            }
            uvloop.run(measure(servers, {k: v[: max(connections, 20)] for k, v in sent.items()}, connections, 1))
            results = uvloop.run(measure(servers, sent, connections, arguments.rounds))
            cpu = {name: statistics.median(r.cpu_ms for r in runs) for name, runs in results.items()}
            for name, runs in results.items():
                if failures := sum(r.failures for r in runs):
                    raise SystemExit(f"{failures} requests to '{name}' failed; its own output says why.")
                rate = statistics.median(r.rate for r in runs)
                first = statistics.median(r.first_ms() for r in runs)
                print(
                    f"| {prompt}/{output} | {connections} | {name} | {cpu[name]:.2f} | {cpu[name] / cpu['bare']:.2f} "
                    f"| {cpu[name] / cpu['bare, fastokens']:.2f} | {rate:.0f} | {first:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
