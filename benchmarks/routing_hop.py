"""What the Router adds to a request: CPU time, through the Router's endpoint and straight to a worker's, by turns.

    python -m benchmarks.routing_hop

One process, the local runtime, an engine that answers at once and publishes no KV events; prompts of 2,000 tokens are
hashed and looked up as ever. CPU time rather than time, so that whatever else the machine does is left out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import dynamo
from core.engine import EngineRegistry, Source
from core.graph import Deployment, load_plan, load_settings
from core.runtime import Address, Client, LocalRuntime

PROMPT = list(range(100, 2100))
ROUNDS, DELTAS, REQUESTS = 5, 40_000, 1_000


class InstantEngine:
    """Answers at once."""

    @dynamo.hookimpl
    def describe_engine(self) -> dynamo.EngineDescription:
        return dynamo.EngineDescription(
            name="instant",
            summary="Answers at once",
            model_required=False,
            capabilities=dynamo.Capabilities(prefix_caching=True, kv_events=True),
        )

    @dynamo.hookimpl
    async def start_engine(self) -> dynamo.EngineInfo:
        return dynamo.EngineInfo(
            vocab_size=8192, max_model_len=200_000, eos_token_ids=(), block_size=16, num_kv_blocks=100_000
        )

    @dynamo.hookimpl
    async def decode(self, request: dynamo.EngineRequest) -> AsyncIterator[dynamo.Delta]:
        for _ in range(request.stop.max_tokens - 1):
            yield dynamo.Delta([5])
        yield dynamo.Delta([5], dynamo.FinishReason.LENGTH)

    @dynamo.hookimpl
    async def kv_events(self) -> AsyncIterator[dynamo.KvEventBatch]:
        yield dynamo.KvEventBatch(0, [dynamo.KvCleared()])
        await asyncio.Event().wait()

    @dynamo.hookimpl
    async def abort(self, request_id: str) -> None:
        """Nothing runs."""

    @dynamo.hookimpl
    def load(self) -> list[dynamo.Load]:
        return [dynamo.Load(running=0, waiting=0)]

    @dynamo.hookimpl
    async def stop_engine(self) -> None:
        """Nothing is held."""


async def take(client: Client, name: str, tokens: int) -> None:
    """One request, to its end."""
    request = dynamo.EngineRequest(
        request_id=name, token_ids=PROMPT, stop=dynamo.StopConditions(max_tokens=tokens, ignore_eos=True)
    )
    async for _ in client.stream(request, dynamo.RequestContext(request_id=name)):
        pass


async def main() -> None:
    """Prints, for both ways, the best round."""
    engines = EngineRegistry(entry_points=[])
    engines.add(InstantEngine, Source("instant", "benchmarks"))
    overrides = [("Worker.engine", "instant"), ("Worker.ServiceArgs.workers", "4")]
    plan = load_plan("graphs.agg_router:Router")
    settings = load_settings(plan, overrides=overrides, environment={})
    async with LocalRuntime() as runtime, Deployment(plan, settings, runtime, engines=engines):
        ways = {way: runtime.client(Address("dynamo", way, "generate")) for way in ("Worker", "Router")}
        best = dict.fromkeys(ways, (float("inf"), float("inf")))
        for round_ in range(ROUNDS):
            for way, client in ways.items():
                start = time.process_time()
                for number in range(20):
                    await take(client, f"{round_}-d{number}", DELTAS // 20)
                delta = (time.process_time() - start) / DELTAS
                start = time.process_time()
                for number in range(REQUESTS):
                    await take(client, f"{round_}-r{number}", 1)
                request = (time.process_time() - start) / REQUESTS
                best[way] = min(best[way][0], delta), min(best[way][1], request)
    for way, (delta, request) in best.items():
        print(f"{way:<8}{delta * 1e6:6.2f} µs of CPU a delta {request * 1e6:8.1f} µs a request of {len(PROMPT)} tokens")
    added = [best["Router"][place] - best["Worker"][place] for place in (0, 1)]
    print(f"added   {added[0] * 1e6:6.2f} µs             {added[1] * 1e6:8.1f} µs")


if __name__ == "__main__":
    asyncio.run(main())
