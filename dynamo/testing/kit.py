"""What every rule stands on: the author's settings, the engines that are started for them, and their fixtures."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from core.engine import Adapter
from dynamo import EngineConfig, EngineHost, EngineInfo, EngineRegistry, Role, Source
from dynamo.testing.loop import LoopThread
from dynamo.testing.pair import Pair
from dynamo.testing.results import Recorder
from dynamo.testing.rule import declares
from dynamo.testing.target import Target

RESULTS = "DYNAMO_CONFORMANCE_RESULTS"
"""Environment variable naming a folder; each engine's outcomes are written there for `dynamo.testing.matrix`."""

CRAMPED_TOKENS = 256
"""Room of the cramped engine's KV cache, in tokens."""


class Kit:
    """The engines of one test class, all on one loop. Owns and ends them."""

    def __init__(self, settings: type[Conformance], config: dict[str, Any]) -> None:
        """Starts the loop and no engine. Raises `ConfigError` when there is no such engine, or it is invalid."""
        self.adapter = _adapter(settings.engine)
        self.name = self.adapter.description.name
        self.config = config
        self.settings = settings
        self._loop = LoopThread()
        self._shared: Target | None = None
        self._cramped: Target | None = None
        self._pair: Pair | None = None
        self._numbers = itertools.count()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work` on the loop, within `test_timeout`."""
        return self._loop.run(work, self.settings.test_timeout)

    def run_rule(self, test: Coroutine[Any, Any, None]) -> None:
        """Runs a test, after which nothing may be left on the engines."""
        self.run(self._leaving_nothing(test))

    def host(self, role: Role = Role.AGGREGATED, **overrides: Any) -> EngineHost:
        """A new host, not started."""
        fields = {"worker_id": f"{role}-{next(self._numbers)}"} | self.config | overrides
        fields["engine_args"] = self.config.get("engine_args", {}) | overrides.get("engine_args", {})
        return EngineHost(self.adapter, EngineConfig(**fields), role)

    def target(self, role: Role = Role.AGGREGATED, *, follow: bool = True, **overrides: Any) -> Target:
        """A new engine, not started."""
        settings = self.settings
        return Target(
            self.host(role, **overrides),
            step_timeout=settings.step_timeout,
            start_timeout=settings.start_timeout,
            follow=follow,
        )

    def fresh(self, *, follow: bool = True, **overrides: Any) -> AbstractAsyncContextManager[Target]:
        """An engine of the test's own. With `exclusive`, the class's engines are stopped first and started later."""
        return _Fresh(self, follow, overrides)

    async def shared(self) -> Target:
        """The class's engine, started when first needed."""
        if self._shared is None:
            if self.settings.exclusive:
                await self.stop_all()
            self._shared = await self.target().__aenter__()
        return self._shared

    async def cramped(self) -> Target:
        """The class's second engine: room for few tokens and sequences, so that requests wait and are preempted."""
        if self._cramped is None:
            info: EngineInfo = (await self.shared()).host.info
            if self.settings.exclusive:
                await self.stop_all()
            self._cramped = await self.target(**self._cramped_config(info)).__aenter__()
        return self._cramped

    async def pair(self) -> Pair:
        """The class's prefill and decode engine."""
        if self._pair is None:
            self._pair = await self.new_pair().__aenter__()
        return self._pair

    @asynccontextmanager
    async def fresh_pair(
        self, prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None
    ) -> AsyncIterator[Pair]:
        """A pair of the test's own, with more fields of `EngineConfig` for either engine."""
        async with self.new_pair(prefill, decode) as pair:
            yield pair

    def new_pair(self, prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None) -> Pair:
        """A prefill and a decode engine, not started."""
        checked = {"kv_checksum": True}
        return Pair(
            self.target(Role.PREFILL, **(checked | self.settings.prefill_config | (prefill or {}))),
            self.target(Role.DECODE, **(checked | self.settings.decode_config | (decode or {}))),
        )

    async def stop_all(self) -> None:
        """Stops the class's engines."""
        pair, self._pair = self._pair, None
        if pair is not None:
            await pair.stop()
        targets, self._shared, self._cramped = (self._shared, self._cramped), None, None
        for target in targets:
            if target is not None:
                await target.stop()

    def close(self) -> None:
        """Stops the engines and ends the loop."""
        try:
            self.run(self.stop_all())
        finally:
            self._loop.close()

    def _cramped_config(self, info: EngineInfo) -> dict[str, Any]:
        config: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
        if info.block_size:
            config["num_kv_blocks"] = -(-CRAMPED_TOKENS // info.block_size)
            config["max_model_len"] = min(info.max_model_len, CRAMPED_TOKENS * 3 // 4)
        return config | self.settings.cramped_config

    async def _leaving_nothing(self, test: Coroutine[Any, Any, None]) -> None:
        await test
        for target in (self._shared, self._cramped):
            if target is not None:
                await target.until_idle()
                target.check_follower()
                await target.check_integrity()
        if self._pair is not None:
            await self._pair.until_released()


class _Fresh(AbstractAsyncContextManager[Target]):
    def __init__(self, kit: Kit, follow: bool, overrides: dict[str, Any]) -> None:
        self._kit = kit
        self._target = kit.target(follow=follow, **overrides)

    async def __aenter__(self) -> Target:
        if self._kit.settings.exclusive:
            await self._kit.stop_all()
        return await self._target.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        await self._target.stop()


class Conformance:
    """Settings and fixtures of the kit; see `EngineConformance`."""

    engine: ClassVar[str | type]
    """Name of an installed engine, or an adapter class."""
    config: ClassVar[dict[str, Any]] = {}
    """Fields of `EngineConfig`; `model` at least. Choose float32, so that equal means equal."""
    cramped_config: ClassVar[dict[str, Any]] = {}
    """Fields of `EngineConfig` for the second, small engine, over those that the kit chooses."""
    prefill_config: ClassVar[dict[str, Any]] = {}
    """Fields of `EngineConfig` for the engine that prefills for another."""
    decode_config: ClassVar[dict[str, Any]] = {}
    """Fields of `EngineConfig` for the engine that decodes what another prefilled."""
    other_layouts: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Fields of `EngineConfig` under each of which KV is laid out otherwise; other block sizes are tried anyway."""
    bad_config: ClassVar[dict[str, Any]] = {"model": "no-such-folder/no-such-model", "tokenizer": None}
    """Fields with which a start fails with `ConfigError`."""
    step_timeout: ClassVar[float] = 30.0
    """Longest wait for one delta, one hook, or one condition, in seconds."""
    start_timeout: ClassVar[float] = 600.0
    """Longest start or stop, in seconds."""
    test_timeout: ClassVar[float] = 900.0
    """Longest test, in seconds; nothing hangs for ever."""
    exclusive: ClassVar[bool] = False
    """True when only one instance of the engine fits on the machine at a time."""
    stall_limit: ClassVar[float] = 1.0
    """Longest time that the event loop may stand still, in seconds."""
    logprob_tolerance: ClassVar[float] = 1e-3
    """How far two computations of one log-probability may differ."""
    grammar: ClassVar[str] = 'start: "ab" ("c" | "d") "ef"'
    """A grammar of exactly the texts abcef and abdef, in the syntax that the engine takes."""
    kit: ClassVar[Kit]

    @pytest.fixture(scope="class")
    @classmethod
    def engine_config(cls) -> dict[str, Any]:
        """Fields of `EngineConfig`. Override it, as a fixture of the class, when they need other fixtures."""
        return dict(cls.config)

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _kit(cls, engine_config: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Kit]:
        cls.kit = Kit(cls, engine_config)
        if folder := os.environ.get(RESULTS):
            Recorder.of(request.config).begin(cls, cls.kit.adapter, Path(folder))
        yield cls.kit
        cls.kit.close()

    @pytest.fixture(autouse=True)
    def _applicable(self, _kit: Kit, request: pytest.FixtureRequest) -> None:
        capabilities = _kit.adapter.description.capabilities
        for need in getattr(request.function, "needs", ()):
            if not declares(capabilities, need):
                pytest.skip(f"not applicable: engine '{_kit.name}' does not declare {need}")

    @pytest.fixture
    def target(self, _applicable: None, _kit: Kit) -> Target:
        """The class's engine."""
        return _kit.run(_kit.shared())  # type: ignore[no-any-return]

    @pytest.fixture
    def pair(self, _applicable: None, _kit: Kit) -> Pair:
        """The class's prefill and decode engine."""
        if self.exclusive:
            pytest.skip("two engines at a time are needed, and `exclusive` says that only one fits")
        return _kit.run(_kit.pair())  # type: ignore[no-any-return]

    @pytest.fixture
    def cramped(self, _applicable: None, _kit: Kit) -> Target:
        """The class's small engine."""
        return _kit.run(_kit.cramped())  # type: ignore[no-any-return]


def _adapter(engine: str | type) -> Adapter:
    if isinstance(engine, str):
        return EngineRegistry().get(engine)
    return EngineRegistry(()).add(engine, Source(engine.__name__, engine.__module__))
