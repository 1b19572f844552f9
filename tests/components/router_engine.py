"""An engine with a prefix cache and KV events that does what a test tells it, at the pace the test sets."""

import asyncio
from collections import OrderedDict
from typing import ClassVar

import dynamo

DIE = 13
"""A prompt that begins with this token kills the engine after its first token of output."""
FULL = 17
"""A prompt that begins with this token finds no room while `CacheEngine.full` has the worker's number."""


class CacheEngine:
    """Caches prompts in blocks, says the prompt's ids in turn.

    `engine_args`: `prefill`, seconds a token of prompt that is not cached; `step`, seconds a token of output; `gated`,
    true makes every request wait for `CacheEngine.gate` after its prefill; `blocks`, sizes of KV blocks by worker.
    """

    running: ClassVar[dict[str, "CacheEngine"]] = {}
    """Started engines by worker id."""
    gate: ClassVar[asyncio.Event]
    full: ClassVar[set[str]] = set()
    """Workers (by their names without the random end) that have no room for prompts that begin with FULL."""

    def __init__(self):
        self.config = None
        self.blocks = OrderedDict()
        self.requests = []
        self.open = {}
        self.listeners = 0
        self.events = None
        self.dead = None

    @classmethod
    def begin(cls):
        """A new test."""
        cls.running.clear()
        cls.full.clear()
        cls.gate = asyncio.Event()

    @property
    def block_size(self):
        return self.config.block_size or 16

    @dynamo.hookimpl
    def describe_engine(self):
        return dynamo.EngineDescription(
            name="cache",
            summary="Caches what a test says",
            model_required=False,
            capabilities=dynamo.Capabilities(
                prefix_caching=True, kv_events=True, data_parallel=True, priority=True, lora=False
            ),
        )

    @dynamo.hookimpl
    async def start_engine(self, config):
        config.check_engine_args(["prefill", "step", "gated", "blocks"])
        self.config = config
        self.running[config.worker_id] = self
        return dynamo.EngineInfo(
            vocab_size=8192,
            max_model_len=4096,
            eos_token_ids=(),
            block_size=config.engine_args.get("blocks", {}).get(config.worker_id.rsplit("-", 1)[0], self.block_size),
            num_kv_blocks=config.num_kv_blocks or 1000,
            max_num_seqs=config.max_num_seqs or 8,
            max_num_batched_tokens=config.max_num_batched_tokens or 512,
            data_parallel_size=config.data_parallel_size,
        )

    @dynamo.hookimpl
    async def decode(self, request):
        arguments, tokens = self.config.engine_args, request.token_ids
        if tokens[0] == FULL and self.config.worker_id.rsplit("-", 1)[0] in self.full:
            raise dynamo.Overloaded("no room here")
        self.requests.append(request)
        cached = self.count_cached(tokens, request.data_parallel_rank or 0)
        self.open[request.request_id] = len(tokens) - cached
        try:
            await asyncio.sleep(arguments.get("prefill", 0) * (len(tokens) - cached))
            self.store(tokens, request.data_parallel_rank or 0)
            self.open[request.request_id] = 0
            if arguments.get("gated"):
                await self.gate.wait()
            for number in range(request.stop.max_tokens):
                if self.dead or (number and tokens[0] == DIE):
                    self.dead = "the cache burnt down"
                    raise dynamo.EngineDead(self.dead)
                last = number + 1 == request.stop.max_tokens
                yield dynamo.Delta(
                    [tokens[number % len(tokens)]],
                    dynamo.FinishReason.LENGTH if last else None,
                    cached_tokens=cached if not number else None,
                )
                await asyncio.sleep(arguments.get("step", 0))
        finally:
            del self.open[request.request_id]

    @dynamo.hookimpl
    async def abort(self, request_id):
        """Requests end when their stream is closed."""

    @dynamo.hookimpl
    def load(self):
        ranks = range(self.config.data_parallel_size)
        return [
            dynamo.Load(
                running=len(self.open) if rank == 0 else 0,
                waiting=0,
                tokens_in_flight=sum(self.open.values()) if rank == 0 else 0,
                data_parallel_rank=rank,
            )
            for rank in ranks
        ]

    @dynamo.hookimpl
    async def kv_events(self):
        self.listeners += 1
        self.events = asyncio.Queue()
        held = [self.stored(rank, block) for rank, block in self.blocks]
        sequences = dict.fromkeys(range(self.config.data_parallel_size), 1)
        for rank in sequences:
            first = [dynamo.KvCleared(), *(event for r, event in held if r == rank)]
            yield dynamo.KvEventBatch(0, first, data_parallel_rank=rank)
        try:
            while True:
                rank, event = await self.events.get()
                yield dynamo.KvEventBatch(sequences[rank], [event], data_parallel_rank=rank)
                sequences[rank] += 1
        finally:
            self.listeners -= 1
            self.events = None

    @dynamo.hookimpl
    async def check_health(self):
        if self.dead:
            raise dynamo.EngineDead(self.dead)

    @dynamo.hookimpl
    async def stop_engine(self):
        self.dead = self.dead or "the cache was put away"
        if self.config is not None:
            self.running.pop(self.config.worker_id, None)

    def count_cached(self, tokens, rank):
        size = self.block_size
        full = (len(tokens) - 1) // size
        held = next((n for n in range(full) if (rank, tuple(tokens[: (n + 1) * size])) not in self.blocks), full)
        return held * size

    def store(self, tokens, rank):
        size = self.block_size
        for end in range(size, len(tokens) + 1, size):
            block = tuple(tokens[:end])
            if (rank, block) not in self.blocks:
                self.blocks[rank, block] = None
                if self.events is not None:
                    self.events.put_nowait(self.stored(rank, block))

    def stored(self, rank, block):
        size = self.block_size
        parent = hash(block[:-size]) if len(block) > size else None
        return rank, dynamo.KvStored([hash(block)], parent, list(block[-size:]), size)
