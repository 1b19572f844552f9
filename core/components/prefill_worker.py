"""The prefill worker: computes prompts' KV for the Workers, as it has room."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import ClassVar

from core.components.prefill_meeting import Meeting
from core.components.prefill_messages import PrefillerState
from core.components.prefill_metrics import PrefillMetrics
from core.components.prefill_pair import check_peers
from core.components.worker_config import WorkerConfig
from core.components.worker_engine import WorkerEngine
from core.graph import Preflight, Service, endpoint, on_drain, on_start, on_stop, service
from core.kv.hashing import prompt_hashes
from core.messages import Role
from core.prefill.messages import PrefillTask
from core.prefill.prefill_side import PrefillSide
from core.prefill.runtime_wire import RuntimeWire
from core.runtime import Address


class PrefillWorkerConfig(WorkerConfig, frozen=True, kw_only=True):
    """The Worker's keys. What is not set here is as it was set for the Worker: both run the same model."""

    FOLLOWS: ClassVar[str] = "Worker"


@service(dispensable=True)
class PrefillWorker(Service):
    """Takes prompts from the prefill queue, computes their KV, and keeps it until a Worker has fetched it."""

    Config = PrefillWorkerConfig
    config: PrefillWorkerConfig

    def __init__(self) -> None:
        self._engine: WorkerEngine | None = None
        self._meeting: Meeting | None = None
        self._side: PrefillSide | None = None

    @classmethod
    def preflight(cls, config: PrefillWorkerConfig, look: Preflight) -> None:
        """Raises `ConfigError` when the engine cannot prefill for others here; the Worker looks at the two together."""
        WorkerEngine.preflight("PrefillWorker", config, Role.PREFILL, look)

    @on_start
    async def load(self) -> None:
        """Start the engine, make sure that the live Workers can use its KV, and begin to take tasks."""
        context, runtime, namespace = self.context, self.context.runtime, self.context.settings.namespace
        self._engine = engine = await WorkerEngine.start(context, self.config, Role.PREFILL)
        decoders = runtime.client(Address(namespace, "Worker", "generate")).instances()
        check_peers(engine.card, context.instance, decoders)
        context.metadata = engine.card.encode()
        self._meeting = await Meeting.join(runtime, namespace, engine.host.info, self.config)
        engine.publisher.mirror()
        side = PrefillSide(
            engine.host,
            self._meeting.queue,
            RuntimeWire(runtime, namespace),
            self.config.disagg(),
            worker_id=context.instance,
            key=self._meeting.key,
            prefers=self._held_tokens,
        )
        self._side = side
        await side.start()
        context.metrics.part(PrefillMetrics).add_prefiller(context.instance, side)

    @endpoint()
    async def state(self, request: None) -> AsyncGenerator[PrefillerState, None]:
        """One item: what this worker computes and holds."""
        assert self._side is not None, "the endpoint is served only after the start"
        side, fault = self._side, None
        try:
            side.check_integrity()
        except AssertionError as error:
            fault = str(error)
        computing, holding = side.under_way
        yield PrefillerState(
            worker=self.context.instance,
            computing=computing,
            holding=holding,
            failures=dict(side.ends),
            sessions=side.counts(),
            engine=side.host.load(),
            fault=fault,
        )

    @on_drain
    async def finish(self) -> None:
        """Take nothing more, and keep what is held until it was fetched."""
        if self._side is not None and self._engine is not None:
            await self._side.drain()
            await self._engine.host.drain()

    @on_stop
    async def end(self) -> None:
        """Give unfinished tasks back to the queue and stop the engine."""
        self.context.metrics.part(PrefillMetrics).remove(self.context.instance)
        side, self._side = self._side, None
        if side is not None:
            await side.close()
        meeting, self._meeting = self._meeting, None
        if meeting is not None:
            await meeting.leave(self.context.runtime)
        if self._engine is not None:
            await self._engine.stop()

    def _held_tokens(self, task: PrefillTask) -> int:
        """How many of the task's prompt tokens this worker's cache has."""
        assert self._engine is not None
        size, prompt = self._engine.host.info.block_size, task.request
        if not size:
            return 0
        hashes = task.block_hashes
        if len(hashes) != task.tokens // size:  # the Worker's blocks are of another size
            hashes = tuple(prompt_hashes(prompt.token_ids, size, lora=prompt.lora, cache_salt=prompt.cache_salt))
        return self._engine.publisher.held(hashes) * size
