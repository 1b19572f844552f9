"""Disaggregation when things go wrong: aborts at every moment, engines that stop, messages that come twice."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest

from dynamo import EngineDraining, EngineError, EngineRequest, FinishReason, Overloaded, Rendezvous
from dynamo.testing.handing import KINDS
from dynamo.testing.kit import Conformance
from dynamo.testing.pair import Pair
from dynamo.testing.relay import Relay
from dynamo.testing.rule import rule
from dynamo.testing.run import within

ROLES = ("roles.prefill", "roles.decode")
STORM = 500
"""Requests of the cancellation storm."""
MOMENTS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55)
"""Turns of the event loop after which something happens: every state of a remote prefill is among them."""


class Failing(Conformance):
    """Rules about ends that nobody planned. After each of them nothing is held, on either side."""

    @KINDS
    @rule(*ROLES)
    async def test_abort_at_every_moment(self, pair: Pair, kind: Rendezvous) -> None:
        """A request whose prompt is prefilled elsewhere can be aborted at any moment; then nothing of it is left."""
        pair.require(kind)
        async with pair.relay(kind) as relay:
            for turns in MOMENTS[1:]:
                request = _long(pair, f"abort {kind} {turns}")
                async with relay.stream(request) as stream:
                    reading = asyncio.create_task(stream.finish())
                    await _turn(turns)
                    await relay.abort(request.request_id)
                    run = await reading
                    assert run.finish is FinishReason.ABORT, f"after {turns} turns it ended with {run.finish}"
        await pair.until_released()

    @KINDS
    @rule(*ROLES)
    async def test_closing_at_every_moment(self, pair: Pair, kind: Rendezvous) -> None:
        """So can its stream be closed, or its consumer cancelled."""
        pair.require(kind)
        async with pair.relay(kind) as relay:
            for turns in MOMENTS:
                reading = asyncio.create_task(relay.complete(_long(pair, f"close {kind} {turns}")))
                await _turn(turns)
                await _cancel(reading)
        await pair.until_released()

    @KINDS
    @rule(*ROLES)
    async def test_hooks_are_cancelled(self, pair: Pair, kind: Rendezvous) -> None:
        """reserve_kv, prefill, export_kv and import_kv can be cancelled at any moment; what is held can be released."""
        pair.require(kind)
        for turns in MOMENTS[:6]:
            for steps in range(4):
                async with pair.handoff(_long(pair, f"hooks {kind} {turns} {steps}"), kind) as handoff:
                    calls = (handoff.reserve, handoff.prefill, handoff.export, handoff.import_)
                    for call in calls[:steps]:
                        await call()
                    last = asyncio.ensure_future(calls[steps]())
                    await _turn(turns)
                    await _cancel(last)
        await pair.until_released()

    @rule(*ROLES)
    async def test_abort_of_a_prefill(self, pair: Pair) -> None:
        """prefill of an aborted request returns a first delta that says ABORT, and a session that can be released."""
        prefill = pair.prefill
        prompt = prefill.prompt(prefill.host.info.max_model_len - 8, "aborted prefill")
        if pair.kinds == [Rendezvous.HANDSHAKE]:
            pytest.skip("not applicable: with this rendezvous prefill waits for the decode side")
        aborted = 0
        for turns in MOMENTS[1:6]:
            request = prefill.ask(prompt, 8, cache_salt=str(turns))
            running = asyncio.ensure_future(prefill.host.prefill(request))
            await _turn(turns)
            await prefill.host.abort(request.request_id)
            result = await within(self.step_timeout, running, "an aborted prefill to return")
            for _ in range(2):
                await prefill.host.release_kv(result.session)
            # It may have been computed before the abort was heard of.
            if result.first.finish is FinishReason.ABORT:
                assert not result.first.token_ids, "a token came with the abort of a prompt under way"
                aborted += 1
        assert aborted, "every prompt was computed to its end, though it was aborted as it began"
        await pair.until_released()

    @rule(*ROLES)
    async def test_abort_of_an_imported_sequence(self, pair: Pair) -> None:
        """A sequence that goes on behind imported KV is aborted, or closed, like any other."""
        for close in (False, True):
            async with pair.handoff(_long(pair, f"imported {close}"), pair.kinds[0]) as handoff:
                await handoff.arrive()
                await handoff.release_prefill()
                async with handoff.stream() as stream:
                    for _ in range(3):
                        await stream.next()
                    if not close:
                        await pair.decode.host.abort(handoff.request.request_id)
                        assert (await stream.finish()).finish is FinishReason.ABORT
            await pair.until_released()

    @rule(*ROLES)
    async def test_cancellation_storm_between_engines(self, pair: Pair) -> None:
        """After 500 requests at once that end in every way nothing is held, and every session ended in one way."""
        draw = random.Random(7)
        prompt = pair.decode.prompt(24, "after the storm")
        plain = (await pair.decode.generate(prompt, 8)).tokens
        async with pair.relay(prefill_fallback="local") as relay:
            await asyncio.gather(*(_whim(pair, relay, number, draw) for number in range(STORM)))
            assert relay.remote() > STORM / 20, f"streams came about so: {dict(relay.decode_side.ends)}"
        await pair.until_released()
        assert (await pair.decode.generate(prompt, 8)).tokens == plain
        async with pair.relay() as relay:
            assert (await relay.complete(pair.decode.ask(prompt, 8, cache_salt="storm"))).tokens == plain

    @KINDS
    @rule(*ROLES)
    async def test_everything_is_said_twice(self, pair: Pair, kind: Rendezvous) -> None:
        """When every message between the two sides is delivered twice, every token still comes once."""
        pair.require(kind)
        asked = [_request(pair, f"duplicated {kind} {number}") for number in range(6)]
        expected = [(await pair.decode.complete(pair.decode.renamed(request))).tokens for request in asked]
        async with pair.relay(kind) as relay:
            relay.wire.twice = True
            runs = await relay.together(
                [pair.decode.renamed(request, cache_salt=f"duplicated {kind}") for request in asked]
            )
            assert relay.remote() == len(asked)
        assert [run.tokens for run in runs] == expected

    @rule(*ROLES, "rendezvous.pull")
    async def test_prefill_engine_stops_before_the_import(self) -> None:
        """KV of an engine that has stopped is refused with a retryable EngineError; the prompt can be computed here."""
        async with self.kit.fresh_pair() as pair:
            request = _request(pair, "stopped before")
            expected = (await pair.decode.complete(pair.decode.renamed(request))).tokens
            async with pair.handoff(pair.decode.renamed(request, cache_salt="remote"), Rendezvous.PULL) as handoff:
                await handoff.reserve()
                await handoff.prefill()
                await handoff.export()
                await pair.prefill.stop()
                with pytest.raises(EngineError) as lost:
                    await handoff.import_(seconds=3.0)
                assert lost.value.retryable, f"another prefill could succeed: {lost.value!r}"
                await handoff.release_room()
            assert (await pair.decode.complete(pair.decode.renamed(request))).tokens == expected
            await pair.decode.until_idle()
            await pair.decode.check_integrity()

    @KINDS
    @rule(*ROLES)
    async def test_prefill_engine_stops_at_any_moment(self, pair: Pair, kind: Rendezvous) -> None:
        """When the prefill engine stops while a prompt is with it, the client still gets every token, each once."""
        pair.require(kind)
        lengths = (40, 200)
        expected = {n: (await pair.decode.generate(pair.decode.prompt(n, "stops"), 12)).tokens for n in lengths}
        async with self.kit.fresh_pair() as fresh:
            settings = {"prefill_fallback": "local", "kv_transfer_timeout": 2.0, "prefill_timeout": 3.0}
            settings |= {"prefill_queue_timeout": 1.0, "answer_timeout": 1.0, "stop_timeout": 1.0}
            async with fresh.relay(kind, **settings) as relay:
                asked = [
                    fresh.decode.ask(fresh.decode.prompt(n, "stops"), 12, cache_salt=f"{n} {number}")
                    for number in range(5)
                    for n in lengths
                ]
                running = [asyncio.create_task(relay.complete(request)) for request in asked]
                await fresh.prefill.until(lambda: fresh.prefill.load().running > 0, "a prompt is computed")
                await fresh.prefill.stop()
                runs = await asyncio.gather(*running)
            assert [run.tokens for run in runs] == [expected[len(run.request.token_ids)] for run in runs]
            await fresh.decode.until_idle()
            await fresh.decode.check_integrity()

    @KINDS
    @rule(*ROLES)
    async def test_decode_engine_stops(self, pair: Pair, kind: Rendezvous) -> None:
        """When the decode engine stops while its prompt is with the prefill engine, that one can free everything."""
        pair.require(kind)
        for steps in (1, 2, 3):
            async with self.kit.fresh_pair() as fresh:
                async with fresh.handoff(_long(fresh, f"decode stops {steps}"), kind) as handoff:
                    for step in (handoff.reserve, handoff.prefill, handoff.export)[:steps]:
                        await step()
                    await fresh.decode.stop()
                    if steps == 1 and kind is Rendezvous.PUSH:
                        with contextlib.suppress(EngineError):
                            await handoff.prefill()
                        if handoff.result is not None:
                            with pytest.raises(EngineError):
                                await handoff.export()
                    await handoff.release()
                await fresh.prefill.until_idle()
                await fresh.prefill.check_integrity()

    @rule(*ROLES, "rendezvous.pull")
    async def test_draining_finishes_what_was_begun(self) -> None:
        """Engines that drain take no new prompts, export what they hold, import into and decode what was reserved."""
        async with self.kit.fresh_pair() as pair:
            request = _request(pair, "drained")
            expected = (await pair.decode.complete(pair.decode.renamed(request))).tokens
            async with pair.handoff(pair.decode.renamed(request, cache_salt="drained"), Rendezvous.PULL) as handoff:
                await handoff.reserve()
                await handoff.prefill()
                draining = [asyncio.create_task(target.host.drain()) for target in (pair.prefill, pair.decode)]
                await asyncio.sleep(0)
                with pytest.raises(EngineDraining):
                    await pair.prefill.host.prefill(_request(pair, "too late"))
                with pytest.raises(EngineDraining):
                    await pair.decode.host.reserve_kv(_request(pair, "too late"))
                await handoff.export()
                await handoff.import_()
                assert (await handoff.finish()).tokens == expected
            await within(self.step_timeout, asyncio.gather(*draining), "drain, everything having been released")


def _request(pair: Pair, key: str) -> EngineRequest:
    decode = pair.decode
    return decode.ask(decode.prompt(3 * decode.block_size + 2, key), 8)


def _long(pair: Pair, key: str) -> EngineRequest:
    """A prompt of several steps, and an answer that lasts much longer than its abort."""
    decode = pair.decode
    prompt = decode.prompt(min(5 * decode.block_size + 3, decode.host.info.max_model_len // 2), key)
    return decode.ask(prompt, decode.room(prompt))


async def _whim(pair: Pair, relay: Relay, number: int, draw: random.Random) -> None:
    """One request of the storm."""
    way = draw.choice(("complete", "abort", "close", "cancel"))
    deltas, turns, length, count = (
        draw.randrange(5),
        draw.randrange(60),
        draw.randrange(1, 60),
        draw.randrange(1, 8),
    )
    request = pair.decode.ask(pair.decode.prompt(length, f"storm {number % 23}"), count)
    await _turn(turns)
    async with relay.stream(request) as stream:
        try:
            for _ in range(deltas):
                await stream.next()
                if stream.run.finish:
                    break
            if way == "cancel":
                reading = asyncio.create_task(stream.finish())
                await _turn(turns % 7)
                await _cancel(reading)
            elif way != "close":
                if way == "abort":
                    await relay.abort(request.request_id)
                run = await stream.finish()
                assert run.finish is FinishReason.ABORT or len(run.tokens) == count
        except Overloaded:
            return


async def _turn(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


async def _cancel(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
