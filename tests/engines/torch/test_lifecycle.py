"""Starting, aborting, draining, failing and stopping: nothing is left behind, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from core.engine import EngineHost, EngineRegistry, Source
from core.messages import (
    Constraint,
    ConstraintKind,
    EngineConfig,
    EngineDead,
    EngineDraining,
    FinishReason,
    RequestRejected,
    Role,
)
from engines.torch import TorchEngine
from tests.engines.torch.conftest import Engine, Running, prompt_of, until


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("torch-engine")]


def test_listing_imports_no_engine() -> None:
    """Importing and describing the adapter leaves torch and transformers alone."""
    code = (
        "import sys; from engines.torch import TorchEngine; TorchEngine().describe_engine();"
        "found = {'torch', 'transformers', 'llguidance', 'numpy'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


async def test_stop_is_idempotent_and_null_safe(llama: Path) -> None:
    """Without a start, twice, and with two callers at once; the other hooks do not fail in between."""
    engine = TorchEngine()
    await engine.stop_engine()
    await engine.abort("unknown")
    await engine.drain()
    assert engine.load()[0].running == 0
    with pytest.raises(EngineDead):
        await engine.check_health()
    await engine.start_engine(EngineConfig(model=str(llama), num_kv_blocks=8, device="cpu"), Role.AGGREGATED)
    await engine.check_health()
    await asyncio.gather(engine.stop_engine(), engine.stop_engine())
    await engine.stop_engine()
    assert not engine_threads()


async def test_stopping_while_loading_ends_the_thread(llama: Path) -> None:
    """A start that is cancelled leaves no thread."""
    adapter = EngineRegistry([]).add(TorchEngine, Source("torch", "tests"))
    host = EngineHost(adapter, EngineConfig(model=str(llama), num_kv_blocks=8, device="cpu"), Role.AGGREGATED)
    start = asyncio.create_task(host.start())
    await until(lambda: bool(engine_threads()))
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not engine_threads()


async def test_stop_ends_running_streams(llama: Path, engine: Engine) -> None:
    """They raise EngineDead, and so does every later request."""
    async with engine(llama) as running:
        stream = running.host.decode(running.request(prompt_of(10), 500))
        await anext(stream)
        await running.engine.stop_engine()
        with pytest.raises(EngineDead, match="stopped"):
            async for _ in stream:
                pass
        with pytest.raises(EngineDead):
            await anext(running.engine.decode(running.request(prompt_of(10)), None))
    assert not engine_threads()


async def test_abort_at_each_stage(llama: Path, engine: Engine) -> None:
    """While a constraint compiles, while waiting, in the prompt, while decoding, after the end, and for nobody."""
    async with engine(llama, max_num_seqs=1, max_num_batched_tokens=16) as running:
        abort = running.host.abort
        long = running.host.decode(running.request(prompt_of(10), 900, request_id="decoding"))
        assert (await anext(long)).finish is None

        waiting = asyncio.create_task(running.deltas(running.request(prompt_of(20), request_id="waiting")))
        await running.until(lambda: running.load.waiting == 1)
        await abort("waiting")
        [last] = await waiting
        assert (last.token_ids, last.finish) == ([], FinishReason.ABORT)

        await abort("decoding")
        tail = [delta async for delta in long]
        assert tail[-1].finish is FinishReason.ABORT
        await running.idle()

        prompt = asyncio.create_task(running.deltas(running.request(prompt_of(900), request_id="prompt")))
        await running.until(lambda: 0 < running.load.tokens_in_flight < 900)
        await abort("prompt")
        assert (await prompt)[-1].finish is FinishReason.ABORT
        await running.idle()

        constraint = Constraint(ConstraintKind.JSON_OBJECT)
        compiling = asyncio.create_task(
            running.deltas(running.request(prompt_of(5), constraint=constraint, request_id="compiling"))
        )
        await asyncio.sleep(0)  # the stream has been asked for its first delta, and compiles in a thread
        await abort("compiling")
        assert [(delta.token_ids, delta.finish) for delta in await compiling] == [([], FinishReason.ABORT)]

        await running.tokens(prompt_of(5), 3, request_id="finished")
        for name in ("finished", "unknown", "decoding"):
            await abort(name)
        await running.idle()


async def test_closing_a_stream_aborts_it(llama: Path, engine: Engine) -> None:
    """By `aclose`, and by cancelling the consumer; fifty at once leave nothing."""
    async with engine(llama) as running:
        stream = running.host.decode(running.request(prompt_of(10), 900))
        await anext(stream)
        assert running.load.running == 1
        await stream.aclose()  # type: ignore[attr-defined]
        await running.idle()

        storm = [asyncio.create_task(running.tokens(prompt_of(5 + i, i), 900)) for i in range(50)]
        await running.until(lambda: running.load.running > 5)
        for task in storm:
            task.cancel()
        await asyncio.gather(*storm, return_exceptions=True)
        await running.idle()
        assert len(await running.tokens(prompt_of(10), 4)) == 4


async def test_load_counts_what_is_there(llama: Path, engine: Engine) -> None:
    """Requests are counted from the moment they are submitted, blocks while they are held."""
    async with engine(llama, max_num_seqs=2) as running:
        streams = [running.host.decode(running.request(prompt_of(40, i), 600)) for i in range(5)]
        firsts = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.gather(*firsts[:2])
        await running.until(lambda: (running.load.running, running.load.waiting) == (2, 3))
        assert running.load.tokens_in_flight == 120
        assert running.load.kv_blocks_used >= 6
        assert running.load.kv_blocks_total == 64
        for first in firsts:
            first.cancel()
        for stream in streams[:2]:
            await stream.aclose()  # type: ignore[attr-defined]
        await running.idle()


async def test_drain_refuses_new_and_finishes_running(llama: Path, engine: Engine) -> None:
    """Idempotent, and two may wait for it at once."""
    async with engine(llama) as running:
        job = asyncio.create_task(running.tokens(prompt_of(10), 100))
        await running.until(lambda: running.load.running == 1)
        drains = [asyncio.create_task(running.engine.drain()) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(EngineDraining):
            await anext(running.engine.decode(running.request(prompt_of(5)), None))
        await asyncio.gather(*drains)
        assert len(await job) == 100
        await running.engine.drain()


async def test_a_failing_step_is_the_end(
    llama: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every request fails with EngineDead, so does health, the traceback is logged once, and the thread ends."""
    async with engine(llama) as running:
        jobs = [asyncio.create_task(running.tokens(prompt_of(10, i), 900)) for i in range(3)]
        await running.until(lambda: running.load.running == 3)

        def fail(*_: Any) -> None:
            raise RuntimeError("the moon is in the way")

        monkeypatch.setattr("engines.torch.model.pack", fail)
        with caplog.at_level(logging.ERROR, logger="dynamo.engine.torch"):
            for job in jobs:
                with pytest.raises(EngineDead, match="moon"):
                    await job
        with pytest.raises(EngineDead, match="moon"):
            await running.host.check_health()
        with pytest.raises(EngineDead, match="moon"):
            await anext(running.engine.decode(running.request(prompt_of(5)), None))
        await running.until(lambda: not engine_threads())
        assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_a_second_request_of_the_same_id_is_refused(llama: Path, engine: Engine) -> None:
    """While the first runs; afterwards the id is free again."""
    async with engine(llama) as running:
        stream = running.host.decode(running.request(prompt_of(5), 500, request_id="same"))
        await anext(stream)
        with pytest.raises(RequestRejected, match="running already"):
            await running.tokens(prompt_of(5), request_id="same")
        await stream.aclose()  # type: ignore[attr-defined]
        await running.idle()
        assert len(await running.tokens(prompt_of(5), 3, request_id="same")) == 3


async def test_a_slow_step_does_not_hold_up_the_event_loop(
    llama: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a step takes half a second the loop goes round as ever."""
    from engines.torch.stepper import Stepper

    step = Stepper.step
    inside = threading.Event()

    def slow(self: Stepper) -> Any:
        inside.set()
        time.sleep(0.5)  # the step under test is slow by definition
        return step(self)

    monkeypatch.setattr(Stepper, "step", slow)
    async with engine(llama) as running:
        job = asyncio.create_task(running.tokens(prompt_of(5), 1))
        await running.until(inside.is_set)
        rounds = 0
        while not job.done():
            await asyncio.sleep(0.005)
            rounds += 1
        assert rounds > 20
        assert len(await job) == 1


async def test_a_slow_reader_gets_everything_at_once(llama: Path, engine: Engine) -> None:
    """Deltas that nobody fetched are handed over as one, in order, logprobs included."""
    async with engine(llama) as running:
        expected = await running.tokens(prompt_of(10), 30)
        stream = running.host.decode(running.request(prompt_of(10), 30, logprobs=0))
        first = await anext(stream)
        await running.until(lambda: running.load.running == 0)
        rest = [delta async for delta in stream]
        assert len(rest) < 5
        tokens = [token for delta in (first, *rest) for token in delta.token_ids]
        logprobs = [entry.token_id for delta in (first, *rest) for entry in delta.logprobs or []]
        assert tokens == logprobs == expected


async def test_two_engines_in_one_process(llama: Path, engine: Engine) -> None:
    """They share nothing: stopping one leaves the other running."""
    async with engine(llama, worker_id="a") as first:
        async with engine(llama, worker_id="b") as second:
            expected = await first.tokens(prompt_of(20), 10)
            both: list[Running] = [first, second]
            assert await asyncio.gather(*(one.tokens(prompt_of(20), 10) for one in both)) == [expected] * 2
        assert await first.tokens(prompt_of(20), 10) == expected


async def test_engines_of_one_process_start_at_once(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loading switches what the whole process shares, so it takes turns; and it draws no bar over its owner's view."""
    adapter = EngineRegistry([]).add(TorchEngine, Source("torch", "dynamo-serve"))
    hosts = [EngineHost(adapter, EngineConfig(model=str(llama), num_kv_blocks=64), Role.AGGREGATED) for _ in range(3)]
    try:
        infos = await asyncio.gather(*(host.start() for host in hosts))
    finally:
        await asyncio.gather(*(host.stop() for host in hosts))
    assert {info.num_kv_blocks for info in infos} == {64}
    assert "Loading weights" not in capfd.readouterr().err
