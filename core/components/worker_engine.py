"""One replica's engine: the model fetched, the engine started, watched and stopped, for a Worker or a PrefillWorker."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from core.components.card import WorkerCard
from core.components.kv_publisher import KvPublisher
from core.components.model_folder import check_model, display_name, resolve_model
from core.components.worker_config import WorkerConfig
from core.engine import EngineHost
from core.graph import Preflight
from core.graph.config.settings import blame
from core.graph.context import ServiceContext
from core.messages import EngineDead, Role

logger = logging.getLogger("dynamo.worker")


class WorkerEngine:
    """Owned by a service. `start` once; `stop` always, idempotent."""

    def __init__(self, host: EngineHost, card: WorkerCard, context: ServiceContext, interval: float) -> None:
        """Use `start`."""
        self.host = host
        self.card = card
        self.publisher = KvPublisher(host, context.instance, context.runtime, context.settings.namespace)
        self._context = context
        self._interval = interval
        self._watch = asyncio.create_task(self._watch_health(), name=f"health of {context.instance}")
        context.metrics.add_engine(context.instance, host.load)

    @staticmethod
    def preflight(service: str, config: WorkerConfig, role: Role, look: Preflight) -> None:
        """Raises `ConfigError` when the engine cannot serve here in this role, or the model's folder is incomplete."""
        settings = look.settings.services[service]
        with blame(settings.setting("engine")):
            adapter = look.engines.get(config.engine)
        EngineHost(adapter, config.engine_config(), role)
        with blame(settings.setting("model")):
            check_model(config.model, weights=adapter.description.model_required)

    @classmethod
    async def start(cls, context: ServiceContext, config: WorkerConfig, role: Role) -> WorkerEngine:
        """Fetch the model if needed and start the engine. Raises `ConfigError` when it cannot serve as configured."""
        adapter = context.engines.get(config.engine)
        weights = adapter.description.model_required
        folder = await asyncio.to_thread(resolve_model, config.model, weights=weights, report=context.report)
        name = config.served_model_name or display_name(config.model)
        device = config.device or (f"cuda:{context.gpus[0]}" if context.gpus else None)
        engine_config = config.engine_config(
            model=str(folder), served_model_name=name, device=device, worker_id=context.instance
        )
        context.report(f"starting {config.engine} with {name}")
        host = EngineHost(adapter, engine_config, role)
        card = WorkerCard(
            info=await host.start(),
            capabilities=adapter.description.capabilities,
            served_name=name,
            tokenizer=config.tokenizer or str(folder),
            lora=tuple(config.lora_modules),
        )
        return cls(host, card, context, config.health_interval)

    async def stop(self) -> None:
        """Stop the engine and what looks after it."""
        self._watch.cancel()
        with suppress(asyncio.CancelledError):
            await self._watch
        self._context.metrics.remove_engine(self._context.instance)
        await self.publisher.close()
        await self.host.stop()

    async def _watch_health(self) -> None:
        """Report the engine's death also when no request is there to notice it."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.host.check_health()
            except EngineDead as error:
                self._context.fail(error)
                return
            except Exception:
                logger.exception("%s: the health check itself failed", self._context.instance)
