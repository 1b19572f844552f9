"""The engine contract: every hook that an engine adapter can implement, in one file.

An adapter is a class whose methods carry `@hookimpl`, named by an entry point of the group `dynamo.engines`. Its
constructor takes no argument and does nothing; each worker gets an instance of its own. Neither importing the module
nor `describe_engine` may import the engine. A hook may take any subset of its arguments, so that an argument added
later breaks nobody; hooks are called by keyword only, with all that they take, so that a default has no meaning.

Life of an instance:

    describe_engine            any time, any number of times, started or not
    start_engine               once; everything below is called only after it returned
    decode / prefill / ...     any number at once, from one event loop
    drain                      no new requests afterwards; running ones finish
    stop_engine                any time, any number of times, also without or after a failed start

Errors. Hooks raise the types of `core.messages.errors`: `RequestRejected` when the request is at fault, `Overloaded`
when there is no room, `EngineDraining` after `drain`, `EngineDead` when the engine is broken for good. Anything else
is a defect: the request fails with an internal error and the traceback is logged. No hook blocks the event loop:
work that computes belongs in a thread or a process.

What the core checks for every engine (`core/engine/admission.py`), no adapter has to: a prompt that is empty, too long
or outside the vocabulary, parameters out of range, and everything that `Capabilities` does not declare. `max_tokens`
arrives clipped to what fits behind the prompt.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pluggy

from core.messages import (
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

PROJECT = "dynamo"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class EngineSpec:
    """The hooks. Every adapter needs describe_engine, start_engine, decode, abort, load and stop_engine.

    What `Capabilities` declares requires more; `core/engine/validate.py` has the table.
    """

    @hookspec(firstresult=True)
    def describe_engine(self) -> EngineDescription:  # type: ignore[empty-body]
        """Say what this adapter is, without importing the engine. Cheap, constant, never raises."""

    @hookspec(firstresult=True)
    async def start_engine(self, config: EngineConfig, role: Role) -> EngineInfo:  # type: ignore[empty-body]
        """Load the model and be ready for requests.

        Post: `decode` (and, by role, `prefill` ...) works; `EngineInfo` states sizes as they really are.
        Raises: `ConfigError` when the configuration cannot work (model missing, block size unsupported, no memory for
        the KV cache: say what to lower). After a failed start only `stop_engine` is called.
        """

    @hookspec(firstresult=True)
    def decode(self, request: EngineRequest, kv: str | None) -> AsyncIterator[Delta]:  # type: ignore[empty-body]
        """Generate a sequence. Called once a request; the stream is a plain async iterator (write an async generator).

        `kv`: None computes everything here; otherwise the session of an imported KV (`import_kv`), and generation goes
        on after it exactly as if it had been computed here. The stream has every generated token either way, the first
        one too: an engine that goes on behind the prefill side's token delivers `KvTicket.first` as its first delta
        and counts it for penalties, seed and constraint; an engine that leaves the last prompt position to the decode
        side samples it. The core itself delivers no token of the prefill side, unless the sequence ended with it.

        Post: deltas carry only new tokens, several at once when that is cheaper; exactly one delta, the last, has
        `finish` set. Token ids, log-probabilities and finish depend on nothing but the request (seeded or greedy).
        Closing the iterator or cancelling its consumer early aborts the request and frees what it held.
        Raises, before the first delta: `RequestRejected` (a constraint that does not compile, an unknown LoRA),
        `Overloaded`, `EngineDraining`. At any time: `EngineDead`.
        A full KV cache is no error: the request waits, or is preempted and resumed, with no visible effect.
        """

    @hookspec(firstresult=True)
    async def prefill(self, request: EngineRequest, reservation: KvReservation | None) -> PrefillResult:  # type: ignore[empty-body]
        """Compute the prompt's KV and the first token, and hold the KV under a session.

        `reservation`: with `push` and `handshake` the room on the decode side. Blocks may be written into it as soon as
        they are computed, but never later than `reservation.expires_in` seconds after the call.

        Post: the session stays held until `release_kv`, or until its lease ends. With `handshake` the session is
        named `request.request_id`, because `export_kv` is called for it while this runs; this returns when the
        decode side has the KV.
        Raises as `decode`. Aborting the request while it runs raises `asyncio.CancelledError` in nobody: the result
        then has a terminal `first` with `FinishReason.ABORT` and a session that is still to be released. Once it
        has returned, raised, or its cancellation has come to an end, nothing more is written into the reservation.
        """

    @hookspec(firstresult=True)
    async def export_kv(self, session: str, reservation: KvReservation | None) -> KvTicket:  # type: ignore[empty-body]
        """A ticket with which another worker can import the session's KV.

        `pull`: called after `prefill`. `push`: called after `prefill`, and returns when every block that the
        `reservation` lacks has been written; the same deadline as there. `handshake`: called while `prefill` runs, and
        returns as soon as the address to meet at is known.

        Post: the KV can be read for `KvTicket.expires_in` seconds.
        Raises: `EngineError` for an unknown, released or expired session. Cancelling it leaves the session held, and
        nothing is written any more once the cancellation has come to an end.
        """

    @hookspec(firstresult=True)
    async def reserve_kv(self, request: EngineRequest) -> KvReservation:  # type: ignore[empty-body]
        """Take room for the prompt's KV on the decode side, before it is computed elsewhere.

        Post: the room is held under the reservation's session until `release_kv`, or until `decode` took it over.
        Raises: `Overloaded` when there is no room; `RequestRejected` as `decode`.
        """

    @hookspec(firstresult=True)
    async def import_kv(self, ticket: KvTicket, session: str) -> None:
        """Fill the reservation `session` with the KV that `ticket` points to.

        The core has checked the ticket and passes on in `ticket.expires_in` how many seconds from now the import may
        take; that deadline lies strictly inside the holder's lease, and the core cancels the call when it passes.

        Post: the KV is here: the exporting side may release it, and `decode(request, kv=session)` continues from it. An
        engine that reads KV only when it schedules the sequence starts it here (it has the request from `reserve_kv`)
        and returns at its first output, which `decode` then delivers. KV that could not be read in time is refused,
        never used.
        Raises: `EngineError` (`retryable` true when another prefill could succeed); the reservation stays held. After
        an error or a cancellation it can be released at once: the engine itself keeps its blocks out of use for as
        long as a transfer could still write to them.
        """

    @hookspec(firstresult=True)
    async def release_kv(self, session: str) -> None:
        """Free what a session holds, whichever side it is of. Idempotent; an unknown session is not an error."""

    @hookspec(firstresult=True)
    async def abort(self, request_id: str) -> None:
        """Stop a request. Its stream ends with `FinishReason.ABORT` after the tokens so far, and its KV is freed.

        It takes effect from the moment that the stream was first asked for a delta. Idempotent; safe for ids that are
        unknown or finished.
        """

    @hookspec(firstresult=True)
    def kv_events(self) -> AsyncIterator[KvEventBatch]:  # type: ignore[empty-body]
        """What becomes reusable and what ceases to be, for as long as the engine runs. One consumer.

        Post: the first batch describes the cache as it is when the stream starts; batches are numbered from 0 without
        gaps, and empty ones may be left out. The stream ends when the engine stops.
        """

    @hookspec(firstresult=True)
    def load(self) -> list[Load]:  # type: ignore[empty-body]
        """What is on the engine at this moment, one entry a data-parallel rank. Cheap; called often.

        Post: `running` and `waiting` together are the requests that the engine has not finished; without any, no KV
        block is used.
        """

    @hookspec(firstresult=True)
    async def check_health(self) -> None:
        """Return when the engine can serve. Raises `EngineDead`, saying why, when it never will again."""

    @hookspec(firstresult=True)
    async def drain(self) -> None:
        """Refuse new requests with `EngineDraining`; return when the running ones have finished. Idempotent."""

    @hookspec(firstresult=True)
    async def stop_engine(self) -> None:
        """Free everything: threads, processes, sockets, memory. Running streams end with `EngineDead`.

        Null-safe and idempotent: called without a start, after a failed start, and twice.
        """
