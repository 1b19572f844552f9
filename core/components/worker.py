"""The worker: one engine, served."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from core.components.prefill_messages import DecodeState
from core.components.prefill_pair import check_pair
from core.components.prefill_worker import PrefillWorker
from core.components.router_messages import FeedRequest
from core.components.worker_config import WorkerConfig
from core.components.worker_engine import WorkerEngine
from core.components.worker_prefill import RemotePrefill
from core.graph import Preflight, Service, client_of, depends, endpoint, on_drain, on_start, on_stop, service
from core.messages import Delta, EngineDead, EngineRequest, RequestContext, RequestRejected, Role


@service()
class Worker(Service):
    """Runs a model on an engine, prefilling by itself or, where a PrefillWorker is linked, with its help."""

    Config = WorkerConfig
    config: WorkerConfig
    prefill_worker = depends(PrefillWorker, optional=True)

    def __init__(self) -> None:
        self._engine: WorkerEngine | None = None
        self._remote: RemotePrefill | None = None

    @classmethod
    def preflight(cls, config: WorkerConfig, look: Preflight) -> None:
        """Raises `ConfigError` when the engine cannot serve here, the model is not complete, or a PrefillWorker that is
        linked could not work for this Worker.
        """
        remote = "PrefillWorker" in look.plan.nodes
        WorkerEngine.preflight("Worker", config, Role.DECODE if remote else Role.AGGREGATED, look)
        if remote:
            check_pair(look)

    @on_start
    async def load(self) -> None:
        """Fetch the model if needed, start the engine, and say what became of it."""
        role = Role.AGGREGATED if self.prefill_worker is None else Role.DECODE
        self._engine = await WorkerEngine.start(self.context, self.config, role)
        self.context.metadata = self._engine.card.encode()
        if self.prefill_worker is not None:
            workers = client_of(self.prefill_worker.state)
            self._remote = await RemotePrefill.start(self._engine, self.context, self.config, workers)

    @endpoint()
    async def generate(self, request: EngineRequest, context: RequestContext) -> AsyncGenerator[Delta, None]:
        """Generate a sequence. See `EngineSpec.decode` for what it raises."""
        host, deltas = self._started.host, None
        try:
            deltas = host.decode(request) if self._remote is None else self._remote.generate(request, context)
            async for delta in deltas:
                yield delta
        except EngineDead as error:
            self.context.fail(error)
            raise
        finally:
            close = getattr(deltas, "aclose", None)
            if close is not None:
                await close()
            elif deltas is not None:
                await host.abort(request.request_id)

    @endpoint()
    async def feed(self, request: FeedRequest) -> AsyncGenerator[bytes, None]:
        """Publish KV events and load for a Router from now on; gives, encoded, the events that it misses."""
        for message in self._started.publisher.answer(request):
            yield message

    @endpoint()
    async def prefill_state(self, request: None) -> AsyncGenerator[DecodeState, None]:
        """One item: what is known of prefilling elsewhere. Raises `RequestRejected` in a graph without it."""
        if self._remote is None:
            raise RequestRejected(f"{self.context.plan.name} has no PrefillWorker.", code="not_found")
        yield await self._remote.state()

    @on_drain
    async def finish(self) -> None:
        """Let the engine finish what runs."""
        await self._started.host.drain()

    @on_stop
    async def end(self) -> None:
        """Let PrefillWorkers go, and stop the engine."""
        if self._remote is not None:
            await self._remote.close()
        if self._engine is not None:
            await self._engine.stop()

    @property
    def _started(self) -> WorkerEngine:
        assert self._engine is not None, "the endpoint is served only after the engine has started"
        return self._engine
