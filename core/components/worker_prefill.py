"""A Worker's use of PrefillWorkers: decides for each prompt, has it prefilled elsewhere, and tells how that went."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from core.components.prefill_live import LiveSettings, shown
from core.components.prefill_meeting import Meeting
from core.components.prefill_messages import DecodeState, PrefillExplanation, WorkerExplanation
from core.components.prefill_metrics import PrefillMetrics
from core.components.prefill_pair import check_peers
from core.components.worker_config import WorkerConfig
from core.components.worker_engine import WorkerEngine
from core.graph.context import ServiceContext
from core.kv.hashing import prompt_hashes
from core.messages import Delta, EngineDead, EngineRequest, FinishReason, RequestContext
from core.prefill.decision import DisaggPolicy, PrefillDecision
from core.prefill.decode_plan import PrefillStory
from core.prefill.decode_side import DecodeSide
from core.prefill.queue import QueueUnavailable
from core.prefill.runtime_wire import RuntimeWire
from core.runtime import Client

logger = logging.getLogger("dynamo.worker")

NOBODY = "The last prefill worker has left."


class RemotePrefill:
    """Owned by a Worker. `start` once its engine runs; `close` before that stops. Idempotent."""

    def __init__(self, engine: WorkerEngine, context: ServiceContext, meeting: Meeting, side: DecodeSide) -> None:
        """Use `start`."""
        self.side = side
        self.decisions: Counter[tuple[str, str]] = Counter()
        """Where prompts were to be prefilled, and why."""
        self._engine = engine
        self._context = context
        self._meeting: Meeting | None = meeting
        self._workers: Client | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._block_size = engine.host.info.block_size

    @classmethod
    async def start(
        cls, engine: WorkerEngine, context: ServiceContext, config: WorkerConfig, workers: Client
    ) -> RemotePrefill:
        """`workers`: a client of any endpoint of the PrefillWorkers.

        Raises `FingerprintMismatch` when KV of a live PrefillWorker cannot be used here, `QueueUnavailable`.
        """
        runtime, namespace = context.runtime, context.settings.namespace
        check_peers(engine.card, context.instance, workers.instances())
        settings, metrics = config.disagg(), context.metrics.part(PrefillMetrics)
        meeting = await Meeting.join(runtime, namespace, engine.host.info, config)
        side = DecodeSide(
            engine.host,
            meeting.queue,
            RuntimeWire(runtime, namespace),
            settings,
            worker_id=context.instance,
            key=meeting.key,
            policy=DisaggPolicy(settings),
            times=metrics.times,
        )
        self = cls(engine, context, meeting, side)
        try:
            await side.start()
        except BaseException:
            await self.close()
            raise
        engine.publisher.mirror()
        self._workers = workers
        live = LiveSettings(runtime, namespace)
        self._tasks = [
            asyncio.create_task(side.policy.follow(live.follow()), name=f"settings of {context.instance}"),
            asyncio.create_task(self._watch_workers(workers), name=f"prefill workers of {context.instance}"),
        ]
        metrics.add_decoder(context.instance, self)
        return self

    async def generate(self, request: EngineRequest, context: RequestContext) -> AsyncGenerator[Delta, None]:
        """The whole stream, as `EngineHost.decode` gives it, wherever the prompt is prefilled.

        Raises what that raises; `EngineError` when the prompt cannot be prefilled elsewhere and may not be here;
        `EngineDead` when this worker stops meanwhile.
        """
        hashes = self._hashes(request)
        cached = self._engine.publisher.held(hashes) * self._block_size
        decision = await self._decide(request, cached)
        told: list[PrefillStory] = []
        explain = context.explain
        async with aclosing(
            self.side.decode(request, decision, block_hashes=tuple(hashes), told=told.append)
        ) as deltas:
            async for delta in deltas:
                if self._closing and delta.finish is FinishReason.ABORT:
                    raise EngineDead(f"{self._context.instance} was stopped.")
                if explain:
                    explain = False
                    delta.decision = self._explained(decision, told)
                yield delta

    async def close(self) -> None:
        """End what is under way, on both sides, and stop answering."""
        self._closing = True
        self._context.metrics.part(PrefillMetrics).remove(self._context.instance)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.side.close()
        meeting, self._meeting = self._meeting, None
        if meeting is not None:
            await meeting.leave(self._context.runtime)

    async def state(self) -> DecodeState:
        """Everything an operator may want to know."""
        side, fault = self.side, None
        try:
            depth = await side.queue.depth()
        except QueueUnavailable:
            depth = None
        try:
            side.check_integrity()
        except AssertionError as error:
            fault = str(error)
        decisions: Counter[str] = Counter()
        for (_, code), count in self.decisions.items():
            decisions[code] += count
        return DecodeState(
            worker=self._context.instance,
            prefill_workers=self._live,
            settings=shown(side.policy),
            decisions=dict(decisions),
            ways=dict(side.ends),
            given_up=dict(side.give_ups),
            imported_tokens=side.imported_tokens,
            under_way=side.under_way,
            rooms=side.counts(),
            engine=side.host.load(),
            queue=side.queue.counts(),
            queue_depth=depth,
            fault=fault,
        )

    async def _decide(self, request: EngineRequest, cached: int) -> PrefillDecision:
        decision = await self.side.decide(request, cached, workers=self._live)
        self.decisions["remote" if decision.remote else "local", decision.code] += 1
        return decision

    def _hashes(self, request: EngineRequest) -> list[int]:
        if not self._block_size:
            return []
        return prompt_hashes(request.token_ids, self._block_size, lora=request.lora, cache_salt=request.cache_salt)

    def _explained(self, decision: PrefillDecision, told: list[PrefillStory]) -> bytes:
        explanation = PrefillExplanation(
            worker=self._context.instance, decision=decision, story=told[0] if told else None
        )
        return msgspec.json.encode(WorkerExplanation(explanation))

    @property
    def _live(self) -> int:
        return 0 if self._workers is None else len(self._workers.instances())

    async def _watch_workers(self, workers: Client) -> None:
        """When the last PrefillWorker leaves, nobody waits for one any longer."""
        async with aclosing(workers.watch()) as events:
            async for event in events:
                if not event.live and not workers.instances():
                    self.side.give_up_waiting(NOBODY)
