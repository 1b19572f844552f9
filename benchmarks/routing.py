"""kv against round-robin on real engines: time to first token and reuse, on conversations and on a recorded trace.

    python -m benchmarks.routing                                        # 40 conversations of 8 turns
    TRACE=conversation_trace.jsonl python -m benchmarks.routing --only trace

Every policy is an arm: a deployment of Router and Workers of its own (torch, the demo model), in this process. Arms
take turns, slice by slice of the same schedule, each finishing its slice before the next begins, so that whatever else
the machine does hits all of them. Requests enter at the Router's endpoint as token ids and leave as deltas: HTTP,
tokenizing and detokenizing cost the same under every policy and are left out.

Columns. `ttft`: from the call to the first delta, ms. `ratio`: to the first policy's. `hit`: part of all prompt tokens
that the workers say they did not compute. `bound`: what one cache as large as all workers' together would have reused
of the same requests in the same order, evicting what was unused longest. `oracle`: what one infinite cache would have.
`of bound`: hit / bound. `busy`: seconds that the policy took to play the schedule.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.routing_bound import reuse_bound
from benchmarks.routing_workloads import Turn, Workload, conversations, trace
from core.components import engine_aliases
from core.graph import Deployment, load_plan, load_settings
from core.messages import EngineRequest, RequestContext, SamplingParams, StopConditions
from core.runtime import Address, Client, LocalRuntime

GENERATE = Address("dynamo", "Router", "generate")
STATE = Address("dynamo", "Router", "state")


class Arm:
    """One policy's deployment, its conversations and what was measured."""

    def __init__(self, policy: str, overrides: list[tuple[str, str]]) -> None:
        self.policy = policy
        self.ttft: list[float] = []
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.busy = 0.0
        self.served: list[tuple[list[int], list[int]]] = []
        self.reasons: dict[str, int] = {}
        self._overrides = [("Router.router", policy), *overrides]
        self._history: dict[int, list[int]] = {}
        self._last: dict[int, asyncio.Task[None]] = {}
        self._client: Client
        self._runtime: LocalRuntime
        self._sent = 0

    async def start(self, stack: AsyncExitStack) -> None:
        """Starts the deployment and warms every worker up."""
        plan = load_plan("graphs.agg_router:Router")
        settings = load_settings(plan, overrides=self._overrides, aliases=engine_aliases([]), environment={})
        self._runtime = await stack.enter_async_context(LocalRuntime())
        deployment = await stack.enter_async_context(Deployment(plan, settings, self._runtime))
        self._client = self._runtime.client(GENERATE)
        workers = self._runtime.client(Address("dynamo", "Worker", "generate"))
        for replica in deployment.replicas("Worker"):
            for size in (600, 40):
                stream = workers.stream(*self._request(list(range(3, size)), 4), replica.context.instance)
                async for _ in stream:
                    pass

    async def play(self, turns: list[Turn], start: float) -> None:
        """Plays turns at their times and returns when all are answered."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        tasks = []
        for turn in turns:
            await asyncio.sleep(began + turn.at - start - loop.time())
            before = self._last.get(turn.conversation) if turn.conversation is not None else None
            task = asyncio.create_task(self._take(turn, before))
            if turn.conversation is not None:
                self._last[turn.conversation] = task
            tasks.append(task)
        await asyncio.gather(*tasks)
        self.busy += loop.time() - began

    async def state(self) -> None:
        """Reads the Router's decisions by reason."""
        async for state in self._runtime.client(STATE).stream(None, RequestContext(request_id="state")):
            self.reasons = state.routing.decisions

    async def _take(self, turn: Turn, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        earlier = self._history.get(turn.conversation, []) if turn.conversation is not None else []
        prompt = [*earlier, *turn.tokens]
        place = len(self.served)
        self.served.append((prompt, prompt))
        answer: list[int] = []
        began = time.perf_counter()
        async for delta in self._client.stream(*self._request(prompt, turn.output)):
            if not answer:
                self.ttft.append(time.perf_counter() - began)
                self.cached_tokens += delta.cached_tokens or 0
            answer += delta.token_ids
        self.prompt_tokens += len(prompt)
        # The last token of an answer was never an input, so its KV does not exist.
        self.served[place] = (prompt, [*prompt, *answer[:-1]])
        if turn.conversation is not None:
            self._history[turn.conversation] = [*prompt, *answer]

    def _request(self, prompt: list[int], output: int) -> tuple[EngineRequest, RequestContext]:
        self._sent += 1
        name = f"{self.policy}-{self._sent}"
        request = EngineRequest(
            request_id=name,
            token_ids=prompt,
            stop=StopConditions(max_tokens=output, ignore_eos=True),
            sampling=SamplingParams(temperature=0.0),
        )
        return request, RequestContext(request_id=name)


async def run(workload: Workload, policies: list[str], workers: int, block: int) -> list[Arm]:
    """Plays a workload under every policy, slice by slice."""
    overrides = [
        ("Worker.ServiceArgs.workers", str(workers)),
        ("Worker.num-kv-blocks", str(workload.blocks)),
        ("Worker.block-size", str(block)),
        ("Worker.engine-args.threads", "1"),
    ]
    async with AsyncExitStack() as stack:
        arms = [Arm(policy, overrides) for policy in policies]
        for arm in arms:
            await arm.start(stack)
        slices = max(1, round(workload.seconds / workload.slice_seconds))
        length = workload.seconds / slices
        for number in range(slices):
            turns = [t for t in workload.turns if number * length <= t.at < (number + 1) * length]
            # Who goes first changes, so that nobody always has the warmer machine.
            for arm in arms if number % 2 else reversed(arms):
                await arm.play(turns, number * length)
            show = "; ".join(f"{a.policy} ttft p50 {statistics.median(a.ttft) * 1e3:.0f} ms" for a in arms if a.ttft)
            print(f"  slice {number + 1} of {slices}: {show}", file=sys.stderr, flush=True)
        for arm in arms:
            await arm.state()
        return arms


def report(workload: Workload, arms: list[Arm], workers: int, block: int) -> dict[str, object]:
    """Prints the table; gives the figures as data."""
    print(f"\n{workload.name}: {workload.note}\n")
    print(f"{'policy':<14}{'n':>6}{'ttft p50':>10}{'ratio':>7}{'ttft p90':>10}{'ratio':>7}{'mean':>8}"
          f"{'hit':>8}{'bound':>8}{'oracle':>8}{'of bound':>10}{'busy s':>8}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for arm in arms:
        quantiles = statistics.quantiles(arm.ttft, n=20)
        row: dict[str, Any] = {
            "policy": arm.policy,
            "requests": len(arm.ttft),
            "ttft_p50_ms": statistics.median(arm.ttft) * 1e3,
            "ttft_p90_ms": quantiles[17] * 1e3,
            "ttft_mean_ms": statistics.fmean(arm.ttft) * 1e3,
            "hit": arm.cached_tokens / arm.prompt_tokens,
            "bound": reuse_bound(arm.served, capacity=workload.blocks * workers, block_size=block),
            "oracle": reuse_bound(arm.served, capacity=None, block_size=block),
            "busy_s": arm.busy,
            "decisions": arm.reasons,
        }
        rows.append(row)
        first = rows[0]
        r50, r90 = (row[key] / first[key] for key in ("ttft_p50_ms", "ttft_p90_ms"))
        print(f"{arm.policy:<14}{len(arm.ttft):>6}{row['ttft_p50_ms']:>10.1f}{r50:>7.2f}{row['ttft_p90_ms']:>10.1f}"
              f"{r90:>7.2f}{row['ttft_mean_ms']:>8.1f}{row['hit']:>8.3f}{row['bound']:>8.3f}{row['oracle']:>8.3f}"
              f"{row['hit'] / row['bound']:>10.3f}{row['busy_s']:>8.1f}")  # fmt: skip
    for arm in arms:
        print(f"{arm.policy}: " + ", ".join(f"{reason} {count}" for reason, count in sorted(arm.reasons.items())))
    return {"workload": workload.name, "note": workload.note, "arms": rows}


def main() -> None:
    """Parses the command and prints a table a workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["conversations", "trace"])
    parser.add_argument("--policies", default="kv,round-robin")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2000, help="tokens that a conversation grows to")
    parser.add_argument("--output", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--room", type=float, default=1.3, help="all caches, in ones that hold each conversation once")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the conversations")
    parser.add_argument("--trace", type=Path, default=os.environ.get("TRACE"), help="a Mooncake trace; or TRACE")
    parser.add_argument("--minutes", type=float, default=15.0, help="of the trace")
    parser.add_argument("--shrink", type=int, default=32, help="prompts of the trace are this many times shorter")
    parser.add_argument("--output-shrink", type=int, default=100)
    parser.add_argument("--speed", type=float, default=3.0, help="the trace's rate, times this")
    parser.add_argument("--trace-blocks", type=int, default=2048, help="KV blocks of a worker, on the trace")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.only == "trace" and args.trace is None:
        parser.error("--trace (or TRACE) names the trace's file")
    workloads = []
    if args.only != "trace":
        workloads.append(
            conversations(
                workers=args.workers, count=args.conversations, turns=args.turns, prompt=args.prompt,
                output=args.output, room=args.room, seconds=args.seconds, block=args.block_size, seed=args.seed,
            )
        )  # fmt: skip
    if args.only != "conversations" and args.trace is not None:
        workloads.append(
            trace(
                Path(args.trace), workers=args.workers, minutes=args.minutes, shrink=args.shrink, speed=args.speed,
                blocks=args.trace_blocks, block=args.block_size, output_shrink=args.output_shrink,
            )
        )  # fmt: skip
    found = []
    for workload in workloads:
        with contextlib.suppress(KeyboardInterrupt):
            arms = asyncio.run(run(workload, args.policies.split(","), args.workers, args.block_size))
            found.append(report(workload, arms, args.workers, args.block_size))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
