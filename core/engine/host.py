"""Runs one adapter instance: the only caller of its hooks, and the owner that ends it.

Each worker has a pluggy manager of its own with exactly one engine in it, so that several workers (and several engines)
live in one process, and so that tracing plug-ins can be registered beside the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from enum import Enum
from types import TracebackType
from typing import Self

import msgspec
import pluggy

from core.engine.admission import Admission
from core.engine.hookspecs import PROJECT, EngineSpec
from core.engine.registry import Adapter
from core.engine.validate import InvalidAdapter
from core.messages import (
    ConfigError,
    Delta,
    EngineConfig,
    EngineDead,
    EngineDescription,
    EngineDraining,
    EngineInfo,
    EngineRequest,
    KvEventBatch,
    KvReservation,
    KvTicket,
    Load,
    PrefillResult,
    Role,
)

logger = logging.getLogger("dynamo.engine")

IDLE_POLL = 0.02
"""Seconds between looks at the load of an engine that has no drain hook."""


class State(Enum):
    """Where an engine is in its life; it never goes back."""

    NEW = "not been started"
    STARTING = "not finished starting"
    SERVING = "started"
    DRAINING = "begun to drain"
    STOPPED = "been stopped"


class EngineHost:
    """One engine in one role. `async with EngineHost(adapter, config, role) as host:` starts and stops it.

    Beyond passing calls on it does what is the same for every engine: requests are checked (`Admission`), new ones are
    refused once draining has begun, and no hook but `describe_engine` and `stop_engine` is called outside its time.
    """

    def __init__(self, adapter: Adapter, config: EngineConfig, role: Role) -> None:
        """Nothing is started yet. Raises `ConfigError` when the adapter cannot do here what is configured."""
        self.description: EngineDescription = adapter.description
        _check_config(adapter, config, role)
        self._adapter = adapter
        self.config = config
        self.instance: object = adapter.create()
        """The adapter's instance; its hooks are called through this host only."""
        self._role = role
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(EngineSpec)
        self._manager.register(self.instance, name=self.description.name)
        self._manager.check_pending()
        self._hook = self._manager.hook
        self._state = State.NEW
        self._stopping = asyncio.Lock()
        self._info: EngineInfo | None = None
        self._admission: Admission | None = None

    @property
    def info(self) -> EngineInfo:
        """Facts of the started engine. Raises `RuntimeError` before `start`."""
        if self._info is None:
            raise RuntimeError("the engine has not been started")
        return self._info

    async def start(self) -> EngineInfo:
        """Loads the model; see `EngineSpec.start_engine`. A failed start is cleaned up before the error is raised.

        Raises: `RuntimeError` on a second start: an instance is started once, a restart takes a new host.
        """
        if self._state is not State.NEW:
            raise RuntimeError(f"engine '{self.description.name}' has {self._state.value}; make a new host")
        self._state = State.STARTING
        if (caution := self._adapter.caution) is not None:
            logger.warning("%s", caution)
        try:
            info = await self._hook.start_engine(config=self.config, role=self._role)
            _check_info(info, self._adapter)
        except BaseException:
            await self.stop()
            raise
        if self._state is not State.STARTING:
            raise EngineDead(f"engine '{self.description.name}' was stopped while it started")
        self._info = msgspec.structs.replace(
            info,
            engine=self.description.name,
            version=info.version or self._adapter.version or "",
            model=info.model or self.config.model,
            role=self._role,
        )
        self._admission = Admission(self.description, self._info)
        self._state = State.SERVING
        return self._info

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def decode(self, request: EngineRequest, kv: str | None = None) -> AsyncIterator[Delta]:
        """See `EngineSpec.decode`. Requests that no engine, or not this one, can serve are refused here and now.

        What was imported before draining began may still be decoded.
        """
        return self._hook.decode(request=self._admit(request, held=kv is not None), kv=kv)  # type: ignore[no-any-return]

    async def prefill(self, request: EngineRequest, reservation: KvReservation | None = None) -> PrefillResult:
        """See `EngineSpec.prefill`."""
        result = await self._hook.prefill(request=self._admit(request), reservation=reservation)
        return result  # type: ignore[no-any-return]

    async def export_kv(self, session: str, reservation: KvReservation | None = None) -> KvTicket:
        """See `EngineSpec.export_kv`."""
        self._require_running()
        return await self._hook.export_kv(session=session, reservation=reservation)  # type: ignore[no-any-return]

    async def reserve_kv(self, request: EngineRequest) -> KvReservation:
        """See `EngineSpec.reserve_kv`."""
        return await self._hook.reserve_kv(request=self._admit(request))  # type: ignore[no-any-return]

    async def import_kv(self, ticket: KvTicket, session: str) -> None:
        """See `EngineSpec.import_kv`."""
        self._require_running()
        await self._hook.import_kv(ticket=ticket, session=session)

    async def release_kv(self, session: str) -> None:
        """See `EngineSpec.release_kv`. Nothing is held by an engine that does not run, so this is then no error."""
        if self._running:
            await self._hook.release_kv(session=session)

    async def abort(self, request_id: str) -> None:
        """See `EngineSpec.abort`. Nothing runs on an engine that does not run, so this is then no error."""
        if self._running:
            await self._hook.abort(request_id=request_id)

    def kv_events(self) -> AsyncIterator[KvEventBatch] | None:
        """See `EngineSpec.kv_events`; None when the engine has no KV events."""
        self._require_running()
        return self._hook.kv_events() if self.description.capabilities.kv_events else None

    def load(self) -> list[Load]:
        """See `EngineSpec.load`."""
        self._require_running()
        return self._hook.load()  # type: ignore[no-any-return]

    async def check_health(self) -> None:
        """See `EngineSpec.check_health`; an adapter without the hook is healthy while its process lives."""
        self._require_running()
        await self._optional(self._hook.check_health())

    async def drain(self) -> None:
        """See `EngineSpec.drain`. New requests are refused here; an adapter without the hook is watched until idle."""
        if not self._running:
            return
        self._state = State.DRAINING
        if self._hook.drain.get_hookimpls():
            await self._hook.drain()
            return
        # The load is a figure to look at, no event; this runs once in an engine's life.
        while self._running and any(rank.running or rank.waiting for rank in self._hook.load()):  # noqa: ASYNC110
            await asyncio.sleep(IDLE_POLL)

    async def stop(self) -> None:
        """See `EngineSpec.stop_engine`. Idempotent, also when called several times at once."""
        self._state = State.STOPPED
        async with self._stopping:
            await self._hook.stop_engine()

    @property
    def _running(self) -> bool:
        return self._state in (State.SERVING, State.DRAINING)

    def _require_running(self) -> None:
        if self._state is State.STOPPED:
            raise EngineDead(f"engine '{self.description.name}' has been stopped")
        if not self._running:
            raise RuntimeError(f"engine '{self.description.name}' has {self._state.value}")

    def _admit(self, request: EngineRequest, *, held: bool = False) -> EngineRequest:
        if self._state is not State.SERVING:
            self._require_running()
            if not held:
                raise EngineDraining(f"engine '{self.description.name}' is about to leave; send the request elsewhere")
        assert self._admission is not None
        return self._admission.admit(request)

    @staticmethod
    async def _optional(call: object) -> None:
        if call is not None:
            await call  # type: ignore[misc]


def _check_config(adapter: Adapter, config: EngineConfig, role: Role) -> None:
    name, capabilities = adapter.description.name, adapter.description.capabilities
    if (why := adapter.unavailable) is not None:
        raise ConfigError(f"Engine '{name}' cannot run here: {why}")
    if role not in capabilities.roles:
        roles = ", ".join(sorted(capabilities.roles))
        raise ConfigError(
            f"Engine '{name}' cannot be a {role} worker; it serves as {roles}. Choose another graph or another engine."
        )
    wishes = (
        ("tensor-parallel-size", config.tensor_parallel_size != 1, capabilities.tensor_parallel),
        ("data-parallel-size", config.data_parallel_size != 1, capabilities.data_parallel),
        ("lora-modules", bool(config.lora_modules), capabilities.lora),
    )
    for key, wished, can in wishes:
        if wished and not can:
            raise ConfigError(f"Engine '{name}' does not support '{key}': leave it out or choose another engine.")


def _check_info(info: object, adapter: Adapter) -> None:
    """Refuses facts that the rest of the house could not work with. Raises `InvalidAdapter`."""
    source = adapter.source
    if not isinstance(info, EngineInfo):
        raise InvalidAdapter(f"{source}: start_engine() gave {type(info).__name__}, expected dynamo.EngineInfo.")
    try:
        msgspec.convert(msgspec.to_builtins(info), EngineInfo)
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidAdapter(f"{source}: start_engine() gave an EngineInfo with a wrong field: {error}.") from error
    for field, least in (("vocab_size", 1), ("max_model_len", 2), ("max_num_seqs", 0), ("data_parallel_size", 1)):
        if (value := getattr(info, field)) < least:
            raise InvalidAdapter(f"{source}: EngineInfo.{field} is {value}; it must be at least {least}.")
    if (info.block_size == 0) != (info.num_kv_blocks == 0) or min(info.block_size, info.num_kv_blocks) < 0:
        raise InvalidAdapter(
            f"{source}: EngineInfo has block_size {info.block_size} and num_kv_blocks {info.num_kv_blocks}; "
            "both are positive, or both 0 when there is no KV cache."
        )
