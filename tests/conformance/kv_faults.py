"""Engines that break one rule of disaggregation each: the torch engine with something gone wrong."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from dynamo import (
    Delta,
    EngineDraining,
    EngineError,
    EngineRequest,
    KvReservation,
    KvTicket,
    PrefillResult,
    RequestRejected,
    SamplingParams,
    hookimpl,
)
from engines.torch import TorchEngine

replace = msgspec.structs.replace


class Swallowing(TorchEngine):
    """Delivers what comes behind the prefill side's token, and not that one."""

    @hookimpl
    async def decode(self, request: EngineRequest, kv: str | None) -> AsyncIterator[Delta]:
        skip = kv is not None
        async for delta in TorchEngine.decode(self, request, kv):
            if skip and delta.finish is None:
                delta.token_ids = delta.token_ids[1:]
                delta.logprobs = delta.logprobs and delta.logprobs[1:]
            skip = False
            yield delta


class Stammering(TorchEngine):
    """Delivers the prefill side's token twice."""

    @hookimpl
    async def decode(self, request: EngineRequest, kv: str | None) -> AsyncIterator[Delta]:
        repeat = kv is not None
        async for delta in TorchEngine.decode(self, request, kv):
            if repeat:
                yield replace(delta, token_ids=delta.token_ids[:1], finish=None, stop_token=None)
                delta = replace(delta, cached_tokens=None, prompt_logprobs=None)
            repeat = False
            yield delta


class Reseeding(TorchEngine):
    """Samples the first token of a prompt with another seed than the rest."""

    @hookimpl
    async def prefill(self, request: EngineRequest, reservation: KvReservation | None) -> PrefillResult:
        sampling = request.sampling
        if sampling.seed is not None:
            request = replace(request, sampling=replace(sampling, seed=sampling.seed + 1))
        return await TorchEngine.prefill(self, request, reservation)


class Unpenalising(TorchEngine):
    """Does not count the prefill side's token for penalties."""

    @hookimpl
    async def reserve_kv(self, request: EngineRequest) -> KvReservation:
        room = await TorchEngine.reserve_kv(self, request)
        assert self._desk is not None
        sampling = self._desk._rooms[room.session].sequence.sampling
        record = sampling.record
        sampling.record = lambda token: setattr(sampling, "record", record)  # type: ignore[method-assign]
        return room


class Unconstrained(TorchEngine):
    """Prefills without the constraint."""

    @hookimpl
    async def prefill(self, request: EngineRequest, reservation: KvReservation | None) -> PrefillResult:
        return await TorchEngine.prefill(self, replace(request, constraint=None), reservation)


class Keeping(TorchEngine):
    """Never releases."""

    @hookimpl
    async def release_kv(self, session: str) -> None:
        """Does nothing."""


class Unpinned(TorchEngine):
    """Lets go of a prompt's KV as soon as it is computed, and hands it out all the same."""

    @hookimpl
    async def prefill(self, request: EngineRequest, reservation: KvReservation | None) -> PrefillResult:
        result = await TorchEngine.prefill(self, request, reservation)
        assert self._thread is not None
        self._thread.free(result.session)
        return result


class Careless(TorchEngine):
    """Uses whatever is in the room, whether the KV came or not."""

    @hookimpl
    async def import_kv(self, ticket: KvTicket, session: str) -> None:
        assert self._desk is not None
        with contextlib.suppress(EngineError):
            await TorchEngine.import_kv(self, ticket, session)
        if room := self._desk._rooms.get(session):
            room.filled, room.first = True, ticket.first


class Hopeless(TorchEngine):
    """Calls what went wrong with one ticket the request's end."""

    @hookimpl
    async def import_kv(self, ticket: KvTicket, session: str) -> None:
        try:
            await TorchEngine.import_kv(self, ticket, session)
        except EngineError as error:
            raise EngineError(str(error)) from error


class Trusting(TorchEngine):
    """Takes KV of any model."""

    @hookimpl
    async def import_kv(self, ticket: KvTicket, session: str) -> None:
        assert self._info is not None
        await TorchEngine.import_kv(self, replace(ticket, fingerprint=self._info.kv_fingerprint), session)


class Greedy(TorchEngine):
    """Has everything sent again."""

    @hookimpl
    async def reserve_kv(self, request: EngineRequest) -> KvReservation:
        return replace(await TorchEngine.reserve_kv(self, request), cached_tokens=0)


class Blaming(TorchEngine):
    """Says that the request is at fault when there is no room."""

    @hookimpl
    async def reserve_kv(self, request: EngineRequest) -> KvReservation:
        try:
            return await TorchEngine.reserve_kv(self, request)
        except EngineError as error:
            raise RequestRejected(str(error)) from error


class Unsendable(TorchEngine):
    """Puts an object into its tickets."""

    @hookimpl
    async def export_kv(self, session: str, reservation: KvReservation | None) -> KvTicket:
        ticket = await TorchEngine.export_kv(self, session, reservation)
        return replace(ticket, payload={"engine": self})


class Verbose(TorchEngine):
    """Puts the KV itself into its tickets."""

    @hookimpl
    async def export_kv(self, session: str, reservation: KvReservation | None) -> KvTicket:
        ticket = await TorchEngine.export_kv(self, session, reservation)
        return replace(ticket, payload=ticket.payload | {"kv": bytes(2 << 20)})


class Impatient(TorchEngine):
    """Decodes nothing any more once it drains, imported or not."""

    @hookimpl
    async def decode(self, request: EngineRequest, kv: str | None) -> AsyncIterator[Delta]:
        if self._draining:
            raise EngineDraining("The engine is draining.")
        async for delta in TorchEngine.decode(self, request, kv):
            yield delta


class Forgetful(TorchEngine):
    """Does not abort."""

    @hookimpl
    async def abort(self, request_id: str) -> None:
        """Does nothing."""


class LastPosition(TorchEngine):
    """No fault: leaves the last prompt position to the decode side, which samples the first token itself."""

    @hookimpl
    async def import_kv(self, ticket: KvTicket, session: str) -> None:
        await TorchEngine.import_kv(self, replace(ticket, first=None), session)


PLAIN = SamplingParams()
FAULTS: list[tuple[type, str, dict[str, Any], str]] = [
    (Swallowing, "prompts_of_every_length", {"kind": "pull"}, "=="),
    (Stammering, "ending_at_once", {"kind": "pull"}, "max_tokens is"),
    (Stammering, "prompts_of_every_length", {"kind": "push"}, "max_tokens is"),
    (Reseeding, "seeded", {"kind": "pull"}, "=="),
    (Unpenalising, "penalties", {}, "=="),
    (Unconstrained, "structured_output", {}, "streams came about so|constraint|=="),
    (Keeping, "released_at_every_state", {"kind": "pull"}, "something is not freed"),
    (Unpinned, "held_blocks_are_not_evicted", {}, "=="),
    (Careless, "late_pull_is_refused", {}, "DID NOT RAISE"),
    (Careless, "no_time_left", {}, "DID NOT RAISE"),
    (Careless, "blocks_outside_the_session", {}, "DID NOT RAISE"),
    (Hopeless, "late_pull_is_refused", {}, "another prefill could succeed"),
    (Hopeless, "prefill_engine_stops_before_the_import", {}, "another prefill could succeed"),
    (Trusting, "other_fingerprint", {}, "DID NOT RAISE"),
    (Greedy, "only_missing_blocks_are_asked_for", {"kind": "pull"}, "b pull"),
    (Blaming, "room_runs_out", {}, "cache is full"),
    (Unsendable, "tickets_fit_into_a_message", {}, "unsupported"),
    (Verbose, "tickets_fit_into_a_message", {}, "<"),
    (Impatient, "draining_finishes_what_was_begun", {}, "draining"),
    (Forgetful, "abort_of_an_imported_sequence", {}, "is FinishReason.ABORT|ABORT"),
]
