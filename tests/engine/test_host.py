"""The host: calls hooks in their time, cleans up what failed, and refuses what the adapter cannot do."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from core.engine import EngineHost, InvalidAdapter, hookimpl
from core.messages import (
    ConfigError,
    Delta,
    EngineConfig,
    EngineDead,
    EngineDraining,
    EngineInfo,
    Role,
)
from tests.engine.adapters import CONFIG, Plain, capable, described, registered, request, tokens_of


def host(kind: type = Plain, config: EngineConfig = CONFIG, role: Role = Role.AGGREGATED) -> EngineHost:
    """A host of the adapter, not started."""
    return EngineHost(registered(kind), config, role)


def instance(of: EngineHost) -> Any:
    """The adapter inside, to see what was asked of it."""
    return of.instance


async def test_starts_and_stops():
    """A host starts its engine, passes requests on, and stops it."""
    async with host() as running:
        assert await tokens_of(running.decode(request())) == [1]
        await running.abort("r")
        await running.check_health()
        assert running.kv_events() is None
        assert running.load()[0].running == 0
    assert instance(running).calls == ["start", "abort", "stop"]


async def test_fills_in_what_it_knows():
    """Name, role, model and version need not be stated by the adapter."""
    kind = described(package="pluggy", install="pip install pluggy")
    async with host(kind) as running:
        info = running.info
        assert (info.engine, info.model, info.role) == ("plain", "models/plain", Role.AGGREGATED)
        assert info.version == registered(kind).version != ""


async def test_failed_start_is_cleaned_up():
    """After a failed start the engine is stopped once, and the error is the engine's."""

    class Failing(Plain):
        @hookimpl
        async def start_engine(self, config: EngineConfig) -> EngineInfo:
            raise ConfigError("no memory for the KV cache: lower num-kv-blocks")

    failed = host(Failing)
    with pytest.raises(ConfigError, match="lower num-kv-blocks"):
        await failed.start()
    assert instance(failed).calls == ["stop"]
    with pytest.raises(EngineDead):
        failed.decode(request())


async def test_cancelled_start_is_cleaned_up():
    """A start that is cancelled is cleaned up as well."""
    begun = asyncio.Event()

    class Slow(Plain):
        @hookimpl
        async def start_engine(self) -> EngineInfo:
            begun.set()
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

    slow = host(Slow)
    task = asyncio.create_task(slow.start())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert instance(slow).calls == ["stop"]


@pytest.mark.parametrize(
    ("info", "says"),
    [
        (None, "gave NoneType, expected dynamo.EngineInfo"),
        (EngineInfo(vocab_size=0, max_model_len=9, eos_token_ids=()), "vocab_size is 0; it must be at least 1"),
        (EngineInfo(vocab_size=9, max_model_len=1, eos_token_ids=()), "max_model_len is 1"),
        (EngineInfo(vocab_size=9, max_model_len=9, eos_token_ids=(), block_size=16), "both 0 when there is no KV"),
        (EngineInfo(vocab_size=9.5, max_model_len=9, eos_token_ids=()), "wrong field: Expected `int`"),
    ],
)
async def test_senseless_facts(info: Any, says: str):
    """An engine that states impossible facts is stopped, and the plug-in is named."""

    class Lying(Plain):
        @hookimpl
        async def start_engine(self) -> EngineInfo:
            return info

    lying = host(Lying)
    with pytest.raises(InvalidAdapter, match="engine plug-in 'plain' of package 'plain-package'") as error:
        await lying.start()
    assert says in str(error.value)
    assert instance(lying).calls == ["stop"]


async def test_starts_once():
    """A restart takes a new host."""
    async with host() as running:
        with pytest.raises(RuntimeError, match="has started; make a new host"):
            await running.start()
    with pytest.raises(RuntimeError, match="has been stopped; make a new host"):
        await running.start()


async def test_before_the_start():
    """Before the start nothing works but stopping; what frees is no error."""
    new = host()
    for call in (new.load, new.kv_events, lambda: new.decode(request()), lambda: new.info):
        with pytest.raises(RuntimeError, match="not been started"):
            call()
    with pytest.raises(RuntimeError, match="not been started"):
        await new.check_health()
    await new.abort("r")
    await new.release_kv("s")
    await new.drain()
    await new.stop()
    assert instance(new).calls == ["stop"]


async def test_after_the_stop():
    """After the stop requests and health end with EngineDead; what frees is no error."""
    async with host() as stopped:
        pass
    with pytest.raises(EngineDead, match="'plain' has been stopped"):
        stopped.decode(request())
    with pytest.raises(EngineDead):
        await stopped.check_health()
    await stopped.abort("r")
    await stopped.release_kv("s")
    await stopped.drain()
    await asyncio.gather(stopped.stop(), stopped.stop())
    assert "abort" not in instance(stopped).calls


async def test_stop_waits_its_turn():
    """Two stops at once do not run into each other."""
    inside = 0

    class Slow(Plain):
        @hookimpl
        async def stop_engine(self) -> None:
            nonlocal inside
            inside += 1
            assert inside == 1
            await asyncio.sleep(0)
            inside -= 1

    slow = host(Slow)
    await slow.start()
    await asyncio.gather(slow.stop(), slow.stop(), slow.stop())


async def test_stop_during_the_start():
    """An engine that is stopped while it starts does not serve afterwards."""
    begun, go = asyncio.Event(), asyncio.Event()

    class Slow(Plain):
        @hookimpl
        async def start_engine(self) -> EngineInfo:
            begun.set()
            await go.wait()
            return EngineInfo(vocab_size=9, max_model_len=9, eos_token_ids=())

    slow = host(Slow)
    task = asyncio.create_task(slow.start())
    await begun.wait()
    await slow.stop()
    go.set()
    with pytest.raises(EngineDead, match="stopped while it started"):
        await task
    with pytest.raises(EngineDead):
        slow.decode(request())


async def test_drain_without_the_hook():
    """An adapter without drain is drained by the host: no new requests, and back when the last has finished."""
    async with host() as draining:
        instance(draining).go.clear()
        reading = asyncio.create_task(tokens_of(draining.decode(request())))
        await asyncio.sleep(0)
        drain = asyncio.create_task(draining.drain())
        await asyncio.sleep(0)
        with pytest.raises(EngineDraining, match="is about to leave"):
            draining.decode(request())
        assert not drain.done()
        instance(draining).go.set()
        assert await reading == [1]
        await asyncio.wait_for(drain, 5)
        await draining.drain()


async def test_drain_ends_with_a_stop():
    """A drain does not outlive the engine."""
    async with host() as draining:
        instance(draining).go.clear()
        stream = draining.decode(request())
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        drain = asyncio.create_task(draining.drain())
        await asyncio.sleep(0)
        await draining.stop()
        await asyncio.wait_for(drain, 5)
        instance(draining).go.set()
        assert (await reading).token_ids == [1]
        await stream.aclose()


async def test_drain_lets_imported_kv_finish():
    """What was imported before draining began may still be decoded."""
    async with host() as draining:
        await draining.drain()
        assert await tokens_of(draining.decode(request(), kv="session")) == [1]


async def test_drain_hook_is_called():
    """An adapter's own drain is called, and requests are refused all the same."""

    class Draining(Plain):
        @hookimpl
        async def drain(self) -> None:
            self.calls.append("drain")

    async with host(Draining) as draining:
        await draining.drain()
        assert instance(draining).calls == ["start", "drain"]
        with pytest.raises(EngineDraining):
            draining.decode(request())


async def test_optional_hooks_are_called():
    """check_health of an adapter that has one is asked."""

    class Sick(Plain):
        @hookimpl
        async def check_health(self) -> None:
            raise EngineDead("the GPU fell off the bus")

    async with host(Sick) as sick:
        with pytest.raises(EngineDead, match="fell off"):
            await sick.check_health()


async def test_subset_of_arguments():
    """A hook gets the arguments that it names."""

    class Few(Plain):
        @hookimpl
        async def start_engine(self) -> EngineInfo:
            return EngineInfo(vocab_size=100, max_model_len=16, eos_token_ids=())

        @hookimpl
        def decode(self, request):
            async def one():
                yield Delta([request.token_ids[0]])

            return one()

    async with host(Few) as few:
        assert await tokens_of(few.decode(request([7]))) == [7]


async def test_many_hosts_in_one_process():
    """Hosts share nothing: each has an instance of its own."""
    async with host() as one, host() as two:
        await one.abort("r")
        assert instance(one).calls == ["start", "abort"]
        assert instance(two).calls == ["start"]


def test_undeclared_role():
    """A role that the adapter does not declare is refused before anything starts, with those it does."""
    with pytest.raises(ConfigError, match=r"'plain' cannot be a prefill worker; it serves as aggregated\. Choose"):
        host(role=Role.PREFILL)


def test_absent_package():
    """An engine whose package is absent is refused with the command that installs it."""
    with pytest.raises(ConfigError, match="cannot run here: package 'no-such' is not installed; install it with: pip"):
        host(described(package="no-such", install="pip install no-such"))


@pytest.mark.parametrize(
    ("config", "capability", "key"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel", "tensor-parallel-size"),
        ({"data_parallel_size": 2}, "data_parallel", "data-parallel-size"),
        ({"lora_modules": {"a": "b"}}, "lora", "lora-modules"),
    ],
)
def test_undeclared_configuration(config: dict[str, Any], capability: str, key: str):
    """A configuration that the adapter does not declare is refused; one that it declares is not."""
    wanted = EngineConfig(model="m", **config)
    with pytest.raises(ConfigError, match=f"'plain' does not support '{key}'"):
        host(config=wanted)
    host(capable(**{capability: True}), wanted)


async def test_untested_version_is_logged(caplog: pytest.LogCaptureFixture):
    """Starting an engine in a version that was never tried logs a warning once."""
    kind = described(package="pluggy", install="pip install pluggy", tested="<1")
    with caplog.at_level(logging.WARNING, logger="dynamo.engine"):
        async with host(kind):
            pass
    assert [record.message for record in caplog.records] == [registered(kind).caution]
