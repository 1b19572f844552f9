"""The worker: one engine, served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import suppress

from core.components.card import WorkerCard
from core.components.kv_publisher import KvPublisher
from core.components.model_folder import check_model, display_name, resolve_model
from core.components.prefill_worker import PrefillWorker
from core.components.router_messages import FeedRequest
from core.components.worker_config import WorkerConfig
from core.engine import EngineHost
from core.graph import Preflight, Service, depends, endpoint, on_drain, on_start, on_stop, service
from core.graph.config.settings import blame
from core.messages import Delta, EngineDead, EngineRequest, RequestContext, Role

logger = logging.getLogger("dynamo.worker")


@service()
class Worker(Service):
    """Runs a model on an engine, prefilling by itself or, where a PrefillWorker is linked, with its help."""

    Config = WorkerConfig
    config: WorkerConfig
    prefill_worker = depends(PrefillWorker, optional=True)

    def __init__(self) -> None:
        self._host: EngineHost | None = None
        self._watch: asyncio.Task[None] | None = None
        self._publisher: KvPublisher | None = None

    @classmethod
    def preflight(cls, config: WorkerConfig, look: Preflight) -> None:
        """Raises `ConfigError` when the engine cannot serve here or the model's folder is not complete."""
        settings = look.settings.services["Worker"]
        with blame(settings.setting("engine")):
            adapter = look.engines.get(config.engine)
        role = Role.DECODE if "PrefillWorker" in look.plan.nodes else Role.AGGREGATED
        EngineHost(adapter, config.engine_config(), role)
        with blame(settings.setting("model")):
            check_model(config.model, weights=adapter.description.model_required)

    @on_start
    async def load(self) -> None:
        """Fetch the model if needed, start the engine, and say what became of it."""
        adapter = self.context.engines.get(self.config.engine)
        weights = adapter.description.model_required
        folder = await asyncio.to_thread(resolve_model, self.config.model, weights=weights, report=self.context.report)
        name = self.config.served_model_name or display_name(self.config.model)
        gpus = self.context.gpus
        device = self.config.device or (f"cuda:{gpus[0]}" if gpus else None)
        config = self.config.engine_config(
            model=str(folder), served_model_name=name, device=device, worker_id=self.context.instance
        )
        self.context.report(f"starting {self.config.engine} with {name}")
        self._host = EngineHost(adapter, config, self._role)
        info = await self._host.start()
        self.context.metadata = WorkerCard(
            info=info,
            capabilities=adapter.description.capabilities,
            served_name=name,
            tokenizer=self.config.tokenizer or str(folder),
            lora=tuple(self.config.lora_modules),
        ).encode()
        self.context.metrics.add_engine(self.context.instance, self._host.load)
        namespace = self.context.settings.namespace
        self._publisher = KvPublisher(self._host, self.context.instance, self.context.runtime, namespace)
        self._watch = asyncio.create_task(self._watch_health(), name=f"health of {self.context.instance}")

    @endpoint()
    async def generate(self, request: EngineRequest, context: RequestContext) -> AsyncGenerator[Delta, None]:
        """Generate a sequence. See `EngineSpec.decode` for what it raises."""
        host, deltas = self._started, None
        try:
            deltas = host.decode(request)
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
        assert self._publisher is not None, "the endpoint is served only after the engine has started"
        for message in self._publisher.answer(request):
            yield message

    @on_drain
    async def finish(self) -> None:
        """Let the engine finish what runs."""
        await self._started.drain()

    @on_stop
    async def end(self) -> None:
        """Stop the engine."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
        self.context.metrics.remove_engine(self.context.instance)
        if self._publisher is not None:
            await self._publisher.close()
        if self._host is not None:
            await self._host.stop()

    async def _watch_health(self) -> None:
        """Report the engine's death also when no request is there to notice it."""
        while True:
            await asyncio.sleep(self.config.health_interval)
            try:
                await self._started.check_health()
            except EngineDead as error:
                self.context.fail(error)
                return
            except Exception:
                logger.exception("%s: the health check itself failed", self.context.instance)

    @property
    def _role(self) -> Role:
        return Role.AGGREGATED if self.prefill_worker is None else Role.DECODE

    @property
    def _started(self) -> EngineHost:
        assert self._host is not None, "the endpoint is served only after the engine has started"
        return self._host
