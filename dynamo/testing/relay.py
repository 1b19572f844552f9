"""Two engines behind the core's own drivers: what a client of a disaggregated deployment gets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Self

from core.kv.secret import deployment_secret
from core.kv.session import SessionCounts
from core.kv.ticket import TicketKey
from core.prefill.decode_plan import Way
from core.prefill.decode_side import DecodeSide
from core.prefill.local_queue import LocalQueue
from core.prefill.messages import Answer, Question
from core.prefill.prefill_side import PrefillSide
from core.prefill.settings import DisaggSettings
from core.prefill.wire import LocalWire
from dynamo import Delta, EngineHost, EngineInfo, EngineRequest, Rendezvous
from dynamo.testing.run import Run, Stream, within


class Relay:
    """`async with pair.relay() as relay:` serves until the block ends; then nothing may be held any more.

    Streams come as from an `EngineHost`, so that the same checks apply to them.
    """

    def __init__(
        self, prefill: EngineHost, decode: EngineHost, kind: Rendezvous | None, timeout: float, settings: dict[str, Any]
    ) -> None:
        """`kind`: the only way of moving KV that is offered; None offers all. `timeout`: for one delta, in seconds.

        `settings`: keys of `DisaggSettings`; what cannot be had remotely is an error unless they say otherwise.
        """
        self.settings = DisaggSettings.of({"remote-prefill": True, "prefill-fallback": "error", **settings})
        self.queue = LocalQueue(self.settings.queue)
        self.wire = TwiceWire()
        key = TicketKey(deployment_secret(None))
        self.prefill_side = PrefillSide(
            prefill, self.queue, self.wire, self.settings, worker_id=prefill.config.worker_id, key=key
        )
        self.decode_side = _OneWay(
            decode, self.queue, self.wire, self.settings, worker_id=decode.config.worker_id, key=key
        )
        self.decode_side.kind = kind
        self._timeout = timeout

    @property
    def info(self) -> EngineInfo:
        """Of the engine that decodes."""
        return self.decode_side.host.info

    async def decode(self, request: EngineRequest, kv: str | None = None) -> AsyncIterator[Delta]:
        """The request's stream, its prompt prefilled by the other engine."""
        assert kv is None, "the relay imports KV by itself"
        decision = await self.decode_side.decide(request)
        async with contextlib.aclosing(self.decode_side.decode(request, decision)) as stream:
            async for delta in stream:
                yield delta

    async def abort(self, request_id: str) -> None:
        """Stops a request wherever it is."""
        await within(self._timeout, self.decode_side.abort(request_id), f"abort of {request_id}")

    def stream(self, request: EngineRequest) -> Stream:
        """The request's stream, not begun."""
        return Stream(self, request, self._timeout)

    async def complete(self, request: EngineRequest) -> Run:
        """Reads the request's stream to the end."""
        async with self.stream(request) as stream:
            return await stream.finish()

    async def together(self, requests: Iterable[EngineRequest]) -> list[Run]:
        """All at once."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.complete(request)) for request in requests]
        return [task.result() for task in tasks]

    def remote(self) -> int:
        """Streams whose prompt the other engine prefilled."""
        ends = self.decode_side.ends
        return ends[Way.IMPORTED] + ends[Way.FIRST]

    async def __aenter__(self) -> Self:
        await self.prefill_side.start()
        await self.decode_side.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await within(self._timeout, self.decode_side.settled(), "the decode side to settle")
                await within(self._timeout, self.prefill_side.drain(), "the prefill side to let go of everything")
        finally:
            await self.decode_side.close()
            await self.prefill_side.close()
        if kind is None:
            self.check_released()

    def check_released(self) -> None:
        """Asserts that every session, on either side, ended in exactly one way."""
        for side, counts in (("prefill", self.prefill_side.counts()), ("decode", self.decode_side.counts())):
            check_ledger(side, counts)
        self.prefill_side.check_integrity()
        self.decode_side.check_integrity()
        self.queue.check_integrity()


class TwiceWire(LocalWire):
    """Carries every question, and if told to carries it a second time, as a network that lost the answer would."""

    twice = False

    async def ask(self, address: str, question: Question, timeout: float) -> Answer:  # noqa: ASYNC109
        """See `Wire.ask`."""
        answer = await super().ask(address, question, timeout)
        if not self.twice:
            return answer
        return await super().ask(address, question, timeout)


class _OneWay(DecodeSide):
    """Offers one way of moving KV where the engine has several."""

    kind: Rendezvous | None = None

    def _rendezvous(self) -> tuple[Rendezvous, ...]:
        return super()._rendezvous() if self.kind is None else (self.kind,)


def check_ledger(side: str, counts: SessionCounts) -> None:
    """Asserts the lifecycle invariant at a quiet moment: opened = imported + released + expired."""
    ended = counts.imported + counts.released + counts.expired
    assert counts.live == 0, f"the {side} side still holds {counts.live} sessions"
    assert counts.opened == ended, f"the {side} side opened {counts.opened} sessions and ended {ended}"
    assert counts.stuck == 0, f"the {side} engine did not free {counts.stuck} sessions"
