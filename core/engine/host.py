"""Runs one adapter instance: the only caller of its hooks, and the owner that ends it.

Each worker has a pluggy manager of its own with exactly one engine in it, so that several workers (and several engines)
live in one process, and so that tracing plug-ins can be registered beside the engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import pluggy

from core.engine.hookspecs import PROJECT, EngineSpec
from core.engine.registry import Adapter
from core.messages import (
    ConfigError,
    Delta,
    EngineConfig,
    EngineDescription,
    EngineInfo,
    EngineRequest,
    KvEventBatch,
    KvReservation,
    KvTicket,
    Load,
    PrefillResult,
    Role,
)


class EngineHost:
    """One engine in one role. `async with EngineHost(adapter, config, role) as host:` starts and stops it."""

    def __init__(self, adapter: Adapter, config: EngineConfig, role: Role) -> None:
        """Nothing is started yet. Raises `ConfigError` when the adapter cannot serve the role here."""
        self.description: EngineDescription = adapter.description
        if (why := adapter.unavailable) is not None:
            raise ConfigError(f"Engine '{self.description.name}' cannot run here: {why}")
        if role not in self.description.capabilities.roles:
            roles = ", ".join(sorted(self.description.capabilities.roles))
            raise ConfigError(
                f"Engine '{self.description.name}' cannot be a {role} worker; it serves as {roles}. "
                "Choose another graph or another engine."
            )
        self._config = config
        self._role = role
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(EngineSpec)
        self._manager.register(adapter.create(), name=self.description.name)
        self._manager.check_pending()
        self._hook = self._manager.hook
        self._info: EngineInfo | None = None

    @property
    def info(self) -> EngineInfo:
        """Facts of the started engine. Raises `RuntimeError` before `start`."""
        if self._info is None:
            raise RuntimeError("the engine has not been started")
        return self._info

    async def start(self) -> EngineInfo:
        """Loads the model; see `EngineSpec.start_engine`. A failed start is cleaned up before the error is raised."""
        try:
            self._info = await self._hook.start_engine(config=self._config, role=self._role)
        except BaseException:
            await self.stop()
            raise
        assert self._info is not None
        return self._info

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def decode(self, request: EngineRequest, kv: str | None = None) -> AsyncIterator[Delta]:
        """See `EngineSpec.decode`."""
        return self._hook.decode(request=request, kv=kv)  # type: ignore[no-any-return]

    async def prefill(self, request: EngineRequest) -> PrefillResult:
        """See `EngineSpec.prefill`."""
        return await self._hook.prefill(request=request)  # type: ignore[no-any-return]

    async def export_kv(self, session: str) -> KvTicket:
        """See `EngineSpec.export_kv`."""
        return await self._hook.export_kv(session=session)  # type: ignore[no-any-return]

    async def reserve_kv(self, request: EngineRequest) -> KvReservation:
        """See `EngineSpec.reserve_kv`."""
        return await self._hook.reserve_kv(request=request)  # type: ignore[no-any-return]

    async def import_kv(self, ticket: KvTicket, session: str) -> None:
        """See `EngineSpec.import_kv`."""
        await self._hook.import_kv(ticket=ticket, session=session)

    async def release_kv(self, session: str) -> None:
        """See `EngineSpec.release_kv`."""
        await self._hook.release_kv(session=session)

    async def abort(self, request_id: str) -> None:
        """See `EngineSpec.abort`."""
        await self._hook.abort(request_id=request_id)

    def kv_events(self) -> AsyncIterator[KvEventBatch] | None:
        """See `EngineSpec.kv_events`; None when the engine has no KV events."""
        return self._hook.kv_events() if self.description.capabilities.kv_events else None

    def load(self) -> list[Load]:
        """See `EngineSpec.load`."""
        return self._hook.load()  # type: ignore[no-any-return]

    async def check_health(self) -> None:
        """See `EngineSpec.check_health`; an adapter without the hook is healthy while its process lives."""
        await self._optional(self._hook.check_health())

    async def drain(self) -> None:
        """See `EngineSpec.drain`; without the hook there is nothing to wait for here, the worker counts its streams."""
        await self._optional(self._hook.drain())

    async def stop(self) -> None:
        """See `EngineSpec.stop_engine`. Idempotent."""
        await self._hook.stop_engine()

    @staticmethod
    async def _optional(call: object) -> None:
        if call is not None:
            await call  # type: ignore[misc]
