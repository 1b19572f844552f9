"""Life cycle: an engine starts, stops, fails and starts again without leaving anything behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from importlib.metadata import packages_distributions

import msgspec
import pytest

from dynamo import ConfigError, EngineDead, EngineHost
from dynamo.testing.kit import Conformance
from dynamo.testing.rule import rule
from dynamo.testing.run import within
from dynamo.testing.target import Target

_LISTING = """
import importlib, sys
module, name, *heavy = sys.argv[1:]
adapter = getattr(importlib.import_module(module), name)
adapter().describe_engine()
print(*[h for h in heavy if h in sys.modules])
"""


class Lifecycle(Conformance):
    """Rules about starting and stopping."""

    @rule()
    async def test_describing_is_constant(self, target: Target) -> None:
        """An engine describes itself alike before it is started, while it runs, and in every instance."""
        adapter = self.kit.adapter.create()
        first = adapter.describe_engine()  # type: ignore[attr-defined]
        assert adapter.describe_engine() == first == self.kit.adapter.description  # type: ignore[attr-defined]
        assert target.host.instance.describe_engine() == first  # type: ignore[attr-defined]

    @rule()
    async def test_listing_imports_no_engine(self) -> None:
        """Importing the adapter and describing it imports nothing of the engine's package."""
        package = self.kit.adapter.description.package
        if package is None:
            pytest.skip(f"not applicable: engine '{self.kit.name}' needs no package")
        heavy = [module for module, owners in packages_distributions().items() if package in owners]
        kind = type(self.kit.adapter.create())
        if kind.__qualname__ != kind.__name__:
            pytest.skip(f"'{kind.__qualname__}' is not at the top of its module and cannot be imported by itself")
        command = [sys.executable, "-c", _LISTING, kind.__module__, kind.__name__, *heavy]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, check=False, timeout=self.step_timeout
        )
        assert done.returncode == 0, f"the adapter's module does not import by itself: {done.stderr}"
        assert not done.stdout.split(), f"imported: {done.stdout}; import it inside start_engine"

    @rule()
    async def test_stop_without_start(self) -> None:
        """Stopping an engine that was never started does nothing, any number of times."""
        host = self.kit.host()
        for _ in range(3):
            await within(self.step_timeout, host.stop(), "stop_engine of an engine that never started")

    @rule()
    async def test_facts_are_consistent(self, target: Target) -> None:
        """A started engine states sizes as they really are: the longest sequence fits the KV cache."""
        info = target.host.info
        assert all(0 <= token < info.vocab_size for token in info.eos_token_ids), (
            f"eos_token_ids {info.eos_token_ids} lie outside the vocabulary of {info.vocab_size}"
        )
        assert info.device.partition(":")[0] in target.can.devices, (
            f"runs on '{info.device}' and declares devices {target.can.devices}"
        )
        if info.block_size:
            capacity = info.block_size * info.num_kv_blocks
            assert info.max_model_len <= capacity, (
                f"max_model_len is {info.max_model_len} and the KV cache has room for {capacity} tokens: "
                "such a sequence would wait for ever"
            )
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(info), type=type(info)) == info

    @rule()
    async def test_health(self, target: Target) -> None:
        """check_health returns while the engine can serve, idle or busy."""
        await within(self.step_timeout, target.host.check_health(), "check_health of an idle engine")
        prompt = target.prompt(8, "health")
        async with target.stream(target.ask(prompt, target.room(prompt))) as stream:
            await stream.next()
            await within(self.step_timeout, target.host.check_health(), "check_health of a busy engine")

    @rule()
    async def test_failed_start(self, target: Target) -> None:
        """A start that cannot work raises ConfigError, stops cleanly, and does not keep another from starting."""
        prompt = target.prompt(12, "failed start")
        before = (await target.generate(prompt)).tokens
        if self.exclusive:
            await self.kit.stop_all()
        host = self.kit.host(**self.bad_config)
        await self._fails(host, f"a start with {self.bad_config}")
        async with self.kit.fresh() as again:
            assert (await again.generate(prompt)).tokens == before, "a failed start changed what the engine answers"

    @rule()
    async def test_unknown_engine_argument(self) -> None:
        """An argument under engine_args that the engine does not know is refused with ConfigError."""
        if self.exclusive:
            await self.kit.stop_all()
        host = self.kit.host(engine_args={"no_such_argument": 1})
        await self._fails(host, "a start with engine_args={'no_such_argument': 1}")

    @rule()
    async def test_stop_frees_and_restarts(self, target: Target) -> None:
        """Stopping ends streams with EngineDead, and every task and thread; another instance then serves alike."""
        prompt = target.prompt(12, "restart")
        before = (await target.generate(prompt)).tokens
        if self.exclusive:
            await self.kit.stop_all()
        tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
        first = self.kit.target()
        await first.__aenter__()
        assert (await first.generate(prompt)).tokens == before, "two instances of the engine answer differently"
        async with first.stream(first.ask(prompt, first.room(prompt))) as stream:
            await stream.next()
            reading = asyncio.create_task(stream.finish())
            await asyncio.sleep(0)
            await first.stop()
            with pytest.raises(EngineDead):
                await within(self.step_timeout, reading, "a stream of a stopped engine to end")
        await within(self.step_timeout, first.host.stop(), "stop_engine, called again")
        assert first.host.instance.describe_engine() == self.kit.adapter.description  # type: ignore[attr-defined]
        left = await self._left(tasks, threads)
        assert not left, f"stop_engine left running: {left}"
        async with self.kit.fresh() as second:
            assert (await second.generate(prompt)).tokens == before, "a restarted engine answers differently"

    async def _fails(self, host: EngineHost, what: str) -> None:
        try:
            with pytest.raises(ConfigError) as failure:
                await within(self.start_timeout, host.start(), what)
        except BaseException:
            # An engine that started after all is not left running behind the failed rule.
            await within(self.step_timeout, host.stop(), "stop_engine after a start that should have failed")
            raise
        assert len(str(failure.value)) > 20, f"the error says too little: {failure.value!r}"
        for _ in range(2):
            await within(self.step_timeout, host.stop(), "stop_engine after a failed start")

    async def _left(self, tasks: set[asyncio.Task[object]], threads: set[threading.Thread]) -> list[str]:
        """What still runs that did not before, after as long as it may take to end."""

        def left() -> list[str]:
            new = asyncio.all_tasks() - tasks - {asyncio.current_task()}
            # The loop's own pool, which asyncio.to_thread fills, lives as long as the loop.
            started = [t for t in set(threading.enumerate()) - threads if not t.name.startswith("asyncio_")]
            return [str(task.get_coro()) for task in new] + [thread.name for thread in started]

        deadline = asyncio.get_running_loop().time() + self.step_timeout
        while left() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - threads tell nobody
            await asyncio.sleep(0.01)
        return left()
