"""Replays a trace over simulated workers, with the real index, load tracker and policies.

    python -m benchmarks.routing_replay --trace conversation_trace.jsonl                # 8 to 256 workers
    python -m benchmarks.routing_replay --trace ... --workers 8 --policies kv,round-robin

A discrete-event simulation in virtual time: no engine, no sleeping, the same result every time. The trace is in the
Mooncake format (one JSON object a line: timestamp in ms, input_length, output_length, hash_ids of 512-token blocks).

A worker is a queue in front of one prefill at a time, beside any number of decoding sequences, over a cache of KV
blocks that evicts what was unused longest, ends of prefixes first. A prompt starts when its blocks fit; its blocks can
be reused once its prefill is done, and routers hear of that `EVENT_DELAY_MS` later, through the KV event follower.
Times come from the polynomials that the simulator of NVIDIA Dynamo uses by default, so that both replays speak of the
same machine: a step that prefills n tokens, 8,192 at most, takes 16.5 + 0.01518 n + 4.21e-7 n^2 ms, a decode step with
a part p of the cache in use 5.74 + 54.01 p - 25.74 p^2 ms. Prefill steps of a worker that decodes take both.

Columns: `reuse` is the part of all prompt tokens that was not computed (`bound`: of one infinite cache); `imbalance`
is the busiest worker's prefill time over the mean. `--scale` multiplies the trace's rate: `1` is the trace as recorded,
and `load` keeps the load a worker as it is with 8 workers. `pure-hit` is `kv` with `load-weight` 0.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from core.kv import BlocksPlaced, BlocksRemoved, KvUpdate, KvUpdateBatch
from core.routing.config import RouterConfig
from core.routing.load import Capacity
from core.routing.query import Query
from core.routing.selector import Selector

TRACE_BLOCK = 512
BLOCK = 64
BATCHED_TOKENS = 8192
EVENT_DELAY_MS = 5.0
POLICIES = ("kv", "round-robin", "least-loaded", "pure-hit")
SIZES = (8, 16, 32, 64, 128, 256)


@dataclass(slots=True)
class Request:
    """One line of the trace. Times are in ms of virtual time."""

    name: str
    arrival: float
    prompt_tokens: int
    output_tokens: int
    blocks: list[int]
    hit: int = 0
    """Leading blocks that were reused."""
    first_token: float = 0.0


def read_trace(path: Path, limit: int | None, scale: float) -> list[Request]:
    """The trace's requests. A block of 512 tokens becomes eight of 64; only full blocks count."""
    requests = []
    with path.open() as file:
        for number, line in enumerate(itertools.islice(file, limit)):
            row = json.loads(line)
            parts = TRACE_BLOCK // BLOCK
            blocks = [name * parts + part + 1 for name in row["hash_ids"] for part in range(parts)]
            length = max(row["input_length"], 1)
            requests.append(
                Request(
                    name=str(number),
                    arrival=row["timestamp"] / scale,
                    prompt_tokens=length,
                    output_tokens=max(row["output_length"], 1),
                    blocks=blocks[: length // BLOCK],
                )
            )
    return requests


def reuse_bound(requests: list[Request]) -> float:
    """Part of the prompt tokens that one infinite cache would reuse."""
    seen: set[int] = set()
    hit = total = 0
    for request in requests:
        known = next((n for n, block in enumerate(request.blocks) if block not in seen), len(request.blocks))
        hit += min(known * BLOCK, request.prompt_tokens)
        total += request.prompt_tokens
        seen.update(request.blocks)
    return hit / total


def prefill_ms(tokens: int) -> float:
    """A step that prefills this many tokens."""
    return 16.50142 + 1.518344e-2 * tokens + 4.209989e-7 * tokens * tokens


class Cache:
    """A worker's KV blocks: in use by sequences, or free and kept for reuse until room is needed."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.users: dict[int, int] = {}
        """Sequences on a reusable block, for blocks that have any."""
        self.free: OrderedDict[int, None] = OrderedDict()
        """Reusable blocks of nobody, the one to evict first at the front."""
        self.private = 0
        """Blocks that cannot be reused: prompts being computed, partial blocks and outputs."""

    def leading_hits(self, blocks: list[int]) -> int:
        users, free = self.users, self.free
        return next((n for n, block in enumerate(blocks) if block not in users and block not in free), len(blocks))

    def in_use(self) -> int:
        return len(self.users) + self.private

    def fits(self, blocks: int) -> bool:
        return self.in_use() + blocks <= self.capacity

    def hold(self, blocks: list[int]) -> None:
        """Takes blocks that are reusable into use."""
        for block in blocks:
            self.users[block] = self.users.get(block, 0) + 1
            self.free.pop(block, None)

    def take(self, blocks: int) -> list[int]:
        """Takes private blocks; gives the reusable ones that had to go for them."""
        self.private += blocks
        excess = self.in_use() + len(self.free) - self.capacity
        return [self.free.popitem(last=False)[0] for _ in range(max(excess, 0))]

    def commit(self, blocks: list[int]) -> None:
        """Private blocks become reusable, in use by their sequence."""
        self.private -= len(blocks)
        self.hold(blocks)

    def release(self, blocks: list[int], private: int) -> None:
        """A sequence ends: its blocks are kept, ends of prefixes to be evicted first."""
        self.private -= private
        for block in reversed(blocks):
            left = self.users[block] - 1
            if left:
                self.users[block] = left
            else:
                del self.users[block]
                self.free[block] = None
                self.free.move_to_end(block)


@dataclass(slots=True)
class Worker:
    """One simulated engine."""

    name: str
    cache: Cache
    waiting: deque[Request] = field(default_factory=deque)
    prefilling: bool = False
    decoding: int = 0
    busy_ms: float = 0.0
    sequence: int = 0


@dataclass
class Result:
    """What one replay measured."""

    policy: str
    workers: int
    ttft: list[float]
    reuse: float
    imbalance: float
    route_us: float

    def quantile(self, part: float) -> float:
        return sorted(self.ttft)[min(int(len(self.ttft) * part), len(self.ttft) - 1)]

    @property
    def mean(self) -> float:
        return sum(self.ttft) / len(self.ttft)


class Replay:
    """One trace over one set of workers under one policy."""

    def __init__(self, requests: list[Request], config: RouterConfig, workers: int, blocks: int) -> None:
        self.now = 0.0
        self.requests = requests
        self.selector = Selector(
            config,
            BLOCK,
            ask=lambda request: None,  # streams begin at 0 and lose nothing: there is never anything to ask for
            clock=lambda: self.now / 1000,
            wall_clock=lambda: self.now / 1000,
        )
        self.workers = {f"worker-{n}": Worker(f"worker-{n}", Cache(blocks)) for n in range(workers)}
        capacity = Capacity(
            block_size=BLOCK, num_kv_blocks=blocks, max_num_batched_tokens=BATCHED_TOKENS, max_num_seqs=256
        )
        for name in self.workers:
            self.selector.add_worker(name, capacity)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()

    def at(self, moment: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (moment, next(self.numbers), action))

    def run(self) -> Result:
        for request in self.requests:
            self.at(request.arrival, lambda r=request: self.arrive(r))  # type: ignore[misc]
        self.route_seconds = 0.0
        while self.events:
            self.now, _, action = heapq.heappop(self.events)
            action()
        self.selector.check_integrity()
        assert self.selector.loads.in_flight == 0, "requests are in flight after the end"
        busy = [worker.busy_ms for worker in self.workers.values()]
        return Result(
            policy=self.selector.policy.name,
            workers=len(self.workers),
            ttft=[request.first_token - request.arrival for request in self.requests],
            reuse=sum(r.hit * BLOCK for r in self.requests) / sum(r.prompt_tokens for r in self.requests),
            imbalance=max(busy) / (sum(busy) / len(busy)),
            route_us=self.route_seconds / len(self.requests) * 1e6,
        )

    def arrive(self, request: Request) -> None:
        query = Query(request.name, range(request.prompt_tokens), block_size=BLOCK, hashes=request.blocks)
        start = time.perf_counter()
        decision = self.selector.dispatch(query)
        self.route_seconds += time.perf_counter() - start
        worker = self.workers[decision.target.worker]
        worker.waiting.append(request)
        self.start_prefill(worker)

    def start_prefill(self, worker: Worker) -> None:
        if worker.prefilling or not worker.waiting:
            return
        request, cache = worker.waiting[0], worker.cache
        # The last token is always computed: its logits are the answer's beginning.
        hit = min(cache.leading_hits(request.blocks), (request.prompt_tokens - 1) // BLOCK)
        total = -(-(request.prompt_tokens + request.output_tokens) // BLOCK)
        held = request.blocks[:hit]
        cache.hold(held)
        if not cache.fits(total - hit) and worker.decoding:
            cache.release(held, 0)
            return  # until a sequence ends
        worker.waiting.popleft()
        worker.prefilling = True
        request.hit = hit
        evicted = cache.take(total - hit)
        if evicted:
            self.publish(worker, BlocksRemoved(evicted))
        new = request.prompt_tokens - hit * BLOCK
        steps, rest = divmod(new, BATCHED_TOKENS)
        duration = steps * prefill_ms(BATCHED_TOKENS) + (prefill_ms(rest) if rest else 0.0)
        if worker.decoding:
            duration += (steps + bool(rest)) * self.decode_ms(worker)
        worker.busy_ms += duration
        self.at(self.now + duration, lambda: self.prefilled(worker, request, total))

    def prefilled(self, worker: Worker, request: Request, total: int) -> None:
        request.first_token = self.now
        worker.prefilling = False
        worker.decoding += 1
        fresh = request.blocks[request.hit :]
        worker.cache.commit(fresh)
        if fresh:
            parent = request.blocks[request.hit - 1] if request.hit else None
            self.publish(worker, BlocksPlaced(fresh, parent))
        self.selector.prefilled(request.name)
        duration = request.output_tokens * self.decode_ms(worker)
        self.at(self.now + duration, lambda: self.finish(worker, request, total - len(request.blocks)))
        self.start_prefill(worker)

    def finish(self, worker: Worker, request: Request, private: int) -> None:
        worker.decoding -= 1
        worker.cache.release(request.blocks, private)
        self.selector.finish(request.name)
        self.start_prefill(worker)

    def decode_ms(self, worker: Worker) -> float:
        part = min(worker.cache.in_use() / worker.cache.capacity, 1.0)
        return 5.74 + 54.01 * part - 25.74 * part * part

    def publish(self, worker: Worker, update: KvUpdate) -> None:
        batch = KvUpdateBatch(worker=worker.name, epoch=1, sequence=worker.sequence, updates=[update])
        worker.sequence += 1
        self.at(self.now + EVENT_DELAY_MS, lambda: self.selector.follower.offer(batch))


def replay(args: argparse.Namespace, policy: str, workers: int, requests: list[Request]) -> Result:
    settings = {"router-seed": 1, **{key: json.loads(value) for key, _, value in (s.partition("=") for s in args.set)}}
    if policy == "pure-hit":
        settings |= {"router": "kv", "load-weight": 0.0}
    else:
        settings |= {"router": policy}
    result = Replay(requests, msgspec.convert(settings, RouterConfig), workers, args.blocks).run()
    result.policy = policy
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=os.environ.get("TRACE"), help="Mooncake trace (or set TRACE)")
    parser.add_argument("--workers", default=",".join(map(str, SIZES)))
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--blocks", type=int, default=16_384, help="KV blocks of 64 tokens a worker")
    parser.add_argument("--scale", default="1,load", help="rates to replay at: a factor, or 'load' for workers / 8")
    parser.add_argument("--requests", type=int, help="only the first ones")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a routing setting, as JSON")
    args = parser.parse_args()
    if args.trace is None or not args.trace.exists():
        parser.error(f"no trace at {args.trace}; name one with --trace or TRACE")
    print(f"{'workers':>7} {'rate':>6} {'policy':<13} {'reuse':>6} {'bound':>6} {'imbalance':>9}"
          f" {'TTFT mean':>10} {'p50':>8} {'p90':>9} {'p99':>9} {'us/route':>9}")  # fmt: skip
    lost = []
    done = set()
    for scale, size in itertools.product(args.scale.split(","), map(int, args.workers.split(","))):
        rate = size / 8 if scale == "load" else float(scale)
        if (rate, size) in done:
            continue
        done.add((rate, size))
        p90 = {}
        for policy in args.policies.split(","):
            requests = read_trace(args.trace, args.requests, rate)
            result = replay(args, policy, size, requests)
            p90[policy] = result.quantile(0.9)
            print(f"{size:>7} {rate:>6g} {policy:<13} {result.reuse:>6.3f} {reuse_bound(requests):>6.3f}"
                  f" {result.imbalance:>9.2f} {result.mean:>10.1f} {result.quantile(0.5):>8.1f} {p90[policy]:>9.1f}"
                  f" {result.quantile(0.99):>9.1f} {result.route_us:>9.1f}", flush=True)  # fmt: skip
        lost += [
            f"{size} workers, rate {rate:g}: {p}" for p in p90 if "kv" in p90 and p != "kv" and p90[p] <= p90["kv"]
        ]
    if lost:
        sys.exit("kv does not beat on p90 TTFT: " + "; ".join(lost))


if __name__ == "__main__":
    main()
