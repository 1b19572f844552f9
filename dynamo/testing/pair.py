"""Two engines under test, one that prefills and one that decodes, and what the core does between them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable
from types import TracebackType
from typing import Self, TypeVar

import msgspec
import pytest

from core.kv.fingerprint import require_match
from core.kv.secret import deployment_secret
from core.kv.ticket import Holder, TicketGate, TicketKey, decode_ticket, encode_ticket, seal
from dynamo import EngineRequest, KvReservation, KvTicket, PrefillResult, Rendezvous
from dynamo.testing.relay import Relay
from dynamo.testing.run import Run, Stream, within
from dynamo.testing.target import Target

T = TypeVar("T")

SECONDS = 20.0
"""That a transfer may take in a rule that is not about time."""
REPLACE = msgspec.structs.replace


class Pair:
    """`async with Pair(...) as pair:` starts and stops both engines."""

    def __init__(self, prefill: Target, decode: Target) -> None:
        self.prefill = prefill
        self.decode = decode
        self.holder = Holder.new(prefill.host.config.worker_id)
        self.audience = decode.host.config.worker_id
        self.key = TicketKey(deployment_secret(None))
        self.gate = TicketGate(self.key, self.audience)

    async def __aenter__(self) -> Self:
        await self.prefill.__aenter__()
        try:
            await self.decode.__aenter__()
        except BaseException:
            await self.prefill.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stops both."""
        try:
            await self.prefill.stop()
        finally:
            await self.decode.stop()

    @property
    def kinds(self) -> list[Rendezvous]:
        """Every way in which KV gets across between the two."""
        can = self.prefill.can.rendezvous & self.decode.can.rendezvous
        return [kind for kind in Rendezvous if kind in can]

    def require(self, kind: Rendezvous) -> None:
        """Skips the test where KV does not get across in this way."""
        if kind not in self.kinds:
            name = self.decode.host.description.name
            pytest.skip(f"not applicable: engine '{name}' does not declare rendezvous.{kind}")

    async def until_released(self) -> None:
        """Returns once neither engine has anything left; their books are then checked."""
        for target in (self.prefill, self.decode):
            await target.until_idle()
            target.check_follower()
            await target.check_integrity()

    def relay(self, kind: Rendezvous | None = None, **settings: object) -> Relay:
        """Both engines behind the core's own drivers, with keys of `DisaggSettings`; see `Relay`."""
        return Relay(self.prefill.host, self.decode.host, kind, self.decode.step_timeout, settings)

    def handoff(self, request: EngineRequest, kind: Rendezvous) -> Handoff:
        """One request, to be taken from hook to hook."""
        return Handoff(self, request, kind)

    async def hand_over(self, request: EngineRequest, kind: Rendezvous) -> Run:
        """The whole way of one request, hook by hook."""
        async with self.handoff(request, kind) as handoff:
            await handoff.arrive()
            return await handoff.finish()


class Handoff:
    """One request on its way between two engines, hook by hook. Leaving it releases whatever is held, on both sides."""

    def __init__(self, pair: Pair, request: EngineRequest, kind: Rendezvous) -> None:
        self.pair = pair
        self.request = request
        self.kind = kind
        self.room: KvReservation | None = None
        self.result: PrefillResult | None = None
        self.ticket: KvTicket | None = None
        self._prefilling: asyncio.Task[PrefillResult] | None = None
        self._timeout = pair.decode.step_timeout
        self.prefill_request = REPLACE(request, request_id=f"{request.request_id}/{secrets.token_hex(4)}")
        """What the prefill engine is asked: every attempt has an id of its own."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._prefilling is not None:
            await self.pair.prefill.host.abort(self.prefill_request.request_id)
            with contextlib.suppress(Exception):
                self.result = await within(self._timeout, self._prefilling, "an aborted prefill to return")
        await self.release()

    async def arrive(self) -> None:
        """Everything up to the KV's being on the decode side."""
        await self.reserve()
        await self.prefill()
        await self.export()
        await self.import_()

    async def reserve(self) -> KvReservation:
        """Room on the decode side."""
        self.room = await self._call(self.pair.decode.host.reserve_kv(self.request), "reserve_kv")
        return self.room

    async def prefill(self) -> PrefillResult | None:
        """The prompt's KV. With `handshake` it is only begun."""
        room = None if self.kind is Rendezvous.PULL else self._writable()
        call = self.pair.prefill.host.prefill(self.prefill_request, room)
        if self.kind is Rendezvous.HANDSHAKE:
            self._prefilling = asyncio.ensure_future(call)
            return None
        self.result = await self._call(call, "prefill")
        return self.result

    async def export(self) -> KvTicket:
        """The ticket, sealed and sent as the core does it."""
        session = self.prefill_request.request_id if self.result is None else self.result.session
        room = None if self.kind is Rendezvous.PULL else self._writable()
        ticket = await self._call(self.pair.prefill.host.export_kv(session, room), "export_kv")
        pair = self.pair
        sealed = seal(
            ticket,
            pair.key,
            holder=pair.holder,
            audience=pair.audience,
            request_id=self.request.request_id,
            expires_in=SECONDS,
            first=None if self.result is None else self.result.first,
        )
        self.ticket = decode_ticket(encode_ticket(sealed))
        return self.ticket

    async def import_(self, ticket: KvTicket | None = None, *, seconds: float = SECONDS) -> None:
        """The KV itself, after the checks that the core makes."""
        ticket = ticket or self.ticket
        assert ticket is not None
        assert self.room is not None
        pair = self.pair
        pair.gate.admit(ticket, holder=pair.holder, request_id=self.request.request_id)
        require_match(pair.decode.host.info.kv_fingerprint, ticket.fingerprint, canonical=ticket.canonical)
        await self.read(ticket, seconds=seconds)

    async def read(self, ticket: KvTicket | None = None, *, seconds: float = SECONDS) -> None:
        """The hook alone."""
        ticket = ticket or self.ticket
        assert ticket is not None
        assert self.room is not None
        call = self.pair.decode.host.import_kv(REPLACE(ticket, expires_in=seconds, mac=b""), self.room.session)
        await self._call(call, "import_kv")
        if self._prefilling is not None:
            self.result = await within(self._timeout, self._prefilling, "prefill to return when the KV has arrived")
            self._prefilling = None

    def stream(self) -> Stream:
        """The answer, behind the imported KV."""
        assert self.room is not None
        return Stream(self.pair.decode.host, self.request, self._timeout, self.room.session)

    async def finish(self) -> Run:
        """The whole answer; by now the prefill side has let go."""
        await self.release_prefill()
        async with self.stream() as stream:
            return await stream.finish()

    async def release_prefill(self) -> None:
        """What the prefill side holds."""
        if self.result is not None:
            await self._call(self.pair.prefill.host.release_kv(self.result.session), "release_kv")

    async def release_room(self) -> None:
        """What the decode side holds."""
        if self.room is not None:
            await self._call(self.pair.decode.host.release_kv(self.room.session), "release_kv")

    async def release(self) -> None:
        """Both."""
        await self.release_prefill()
        await self.release_room()

    def _writable(self) -> KvReservation:
        assert self.room is not None
        return REPLACE(self.room, expires_in=SECONDS)

    async def _call(self, call: Awaitable[T], what: str) -> T:
        return await within(self._timeout, call, what)
