"""One remote prefill on the decode side: carries out what the state machine says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from core.kv.fingerprint import FingerprintMismatch, require_match
from core.kv.lease import Deadline, lease_clock
from core.kv.session import LeaseRefused, Outcome
from core.kv.ticket import Holder, TicketRefused
from core.messages.engine import Rendezvous
from core.messages.errors import EngineError, RequestRejected
from core.messages.kv import KvReservation
from core.prefill.decode_attempt import Attempt
from core.prefill.decode_plan import Plan, PrefillStory, Way
from core.prefill.decode_table import A, E, S
from core.prefill.messages import (
    Answer,
    AttemptFailed,
    Claimed,
    ClaimKv,
    ClaimRefused,
    FailureKind,
    Gone,
    KvReady,
    Noted,
    PrefillTask,
    Proceed,
    SettleAttempt,
    TaskTaken,
)
from core.prefill.session import DecodeSession, Step
from core.prefill.wire import Unreachable, WireError

if TYPE_CHECKING:
    from core.prefill.decode_side import DecodeSide

logger = logging.getLogger("dynamo.prefill")

T = TypeVar("T")
_LATE = "The KV did not arrive within its lease and is not used. If transfers are slow here, raise kv-lease."


class DecodeRun:
    """Owned by a `DecodeSide`. `end` must be called; what is then still under way ends by itself."""

    def __init__(self, side: DecodeSide, task: PrefillTask) -> None:
        settings = side.settings
        self._side = side
        self._task = task
        self._settings = settings
        self._session = DecodeSession(
            fallback=settings.prefill_fallback == "local", poison_falls_back=settings.poisoned_prefill == "local"
        )
        self._plan: asyncio.Future[Plan] = asyncio.get_running_loop().create_future()
        self._attempts: dict[str, Attempt] = {}
        self._room: KvReservation | None = None
        self._late_room: KvReservation | None = None
        self._taken_over: str | None = None
        self._import: asyncio.Task[None] | None = None
        self._deadline: Deadline | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception = EngineError("the remote prefill failed")
        self._asked_at = lease_clock()
        self._taken_at: float | None = None
        self._ready_at: float | None = None
        self._imported_at: float | None = None
        self._do: dict[A, Callable[[str], object]] = {
            A.RESERVE: self._reserve,
            A.SUBMIT: lambda _: self._spawn(self._submit(), "submit"),
            A.CANCEL_TASK: lambda _: self._spawn(side.queue.cancel(task.task_id), "cancel"),
            A.GRANT: self._grant,
            A.REFUSE: self._refuse,
            A.REFUSE_CURRENT: self._refuse,
            A.LET_GO: self._let_go,
            A.LET_GO_CURRENT: self._let_go,
            A.SETTLE: lambda attempt: self._spawn(self._settle(attempt, Outcome.IMPORTED), "settle"),
            A.CONCEAL: self._conceal,
            A.DROP_ROOM: self._drop_room,
            A.DROP_LATE_ROOM: self._drop_late_room,
            A.CLAIM: lambda attempt: self._spawn(self._claim(attempt), "claim"),
            A.IMPORT: self._begin_import,
            A.CANCEL_IMPORT: lambda _: self._cancel_import(),
            A.DECODE: self._decode,
            A.DECODE_LOCALLY: lambda _: self._finish(Plan(Way.LOCAL)),
            A.ABORT_DECODE: lambda _: self._spawn(side.host.abort(task.request.request_id), "abort"),
            A.FREE_ROOM: lambda _: self._free_room(),
            A.EMIT_FIRST: self._emit_first,
            A.FINISH_ABORTED: lambda _: self._finish(Plan(Way.ABORTED)),
            A.FAIL: lambda _: self._finish(Plan(Way.FAILED, error=self._error)),
            A.ARM_RESERVE: lambda _: self._arm(settings.reserve_timeout, "room on this worker"),
            A.ARM_QUEUE: lambda _: self._arm(settings.prefill_queue_timeout, "a prefill worker to take the task"),
            A.ARM_PREFILL: lambda _: self._arm(settings.prefill_timeout, "the prefill"),
            A.ARM_TRANSFER: lambda _: self._arm(settings.kv_transfer_timeout, "the KV transfer"),
            A.ARM_MEETING: self._arm_meeting,
            A.DISARM: lambda _: self._disarm(),
        }

    def start(self) -> None:
        """Begin."""
        self._happen(E.START)

    async def plan(self) -> Plan:
        """What the client's stream is made of, once that is decided."""
        return await asyncio.shield(self._plan)

    def story(self) -> PrefillStory:
        """How it went; complete once `plan` has returned."""
        plan = self._plan.result()
        last = next(reversed(self._attempts.values()), None)
        failed = plan.way in (Way.LOCAL, Way.FAILED)
        return PrefillStory(
            way=plan.way,
            worker=None if last is None else last.taken.worker_id,
            attempts=len(self._attempts),
            queued=_between(self._asked_at, self._taken_at),
            prefill=_between(self._taken_at, self._ready_at),
            transfer=_between(self._ready_at, self._imported_at),
            why=str(self._error) if failed else None,
        )

    def give_up_waiting(self, why: str) -> None:
        """Nobody is there to take the task; nothing happens when somebody has taken it."""
        if self._session.state is S.QUEUED:
            self._error = EngineError(why)
            self._happen(E.TIMEOUT)

    def abort(self) -> None:
        """The client wants no more."""
        if not self._session.over:
            self._happen(E.ABORT)

    def end(self) -> None:
        """The client's stream has ended, whichever way."""
        if self._session.state in (S.DECODING, S.LOCAL):
            self._happen(E.STREAM_ENDED)
        else:
            self.abort()
        for known in self._attempts.values():
            known.reply(Gone("the request has ended"))
        self._plan.cancel()

    async def taken(self, question: TaskTaken) -> Answer:
        """A worker asks whether to go on; answered when that is known."""
        if question.rendezvous not in self._task.rendezvous:
            return Gone(f"the task offers no {question.rendezvous}")
        known = self._attempts.get(question.attempt)
        if known is None:
            known = self._attempts[question.attempt] = Attempt(question)
            if self._session.state is S.QUEUED:
                self._taken_at = lease_clock()
                waited = self._taken_at - self._asked_at
                self._side.times.queue.observe(waited)
                self._side.queue.observe_wait(waited)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        known.asks.append(answer)
        self._happen(E.TAKEN, question.attempt, rendezvous=question.rendezvous, delivery=question.delivery)
        return await answer

    async def ready(self, question: KvReady) -> Answer:
        """A worker has the KV, or a place to meet."""
        known = self._attempts.get(question.attempt)
        if known is None:
            return Gone("the attempt is not known")
        if known.ready is not None:
            return Noted()
        try:
            self._check_ticket(question, known.taken)
        except TicketRefused as error:
            logger.warning("Request '%s': %s", self._task.request.request_id, error)
            self._error = error
            steps = self._happen(E.TICKET_REFUSED, question.attempt)
            return Gone(str(error)) if any(step.action is A.LET_GO for step in steps) else Noted()
        known.ready = question
        self._ready_at = lease_clock()
        if self._taken_at is not None:
            self._side.times.prefill.observe(self._ready_at - self._taken_at)
        ended = question.first is not None and question.first.finish is not None
        steps = self._happen(E.READY, question.attempt, ended=ended)
        return Gone("not needed any more") if any(step.action is A.LET_GO for step in steps) else Noted()

    def failed(self, question: AttemptFailed) -> None:
        """A worker's try is over."""
        if question.kind is FailureKind.REJECTED:
            self._error = RequestRejected(question.message, param=question.param, code=question.code)
        else:
            self._error = EngineError(question.message)
        self._happen(E.FAILED, question.attempt, failure=question.kind)

    def _check_ticket(self, question: KvReady, taken: TaskTaken) -> None:
        if question.ticket is None:
            if question.first is None or question.first.finish is None:
                raise TicketRefused(f"worker '{taken.worker_id}' says that the KV is ready, and sends no ticket for it")
            return
        self._side.gate.admit(
            question.ticket,
            holder=Holder(taken.worker_id, taken.incarnation),
            request_id=self._task.request.request_id,
        )
        try:
            require_match(
                self._side.host.info.kv_fingerprint,
                question.ticket.fingerprint,
                canonical=question.ticket.canonical,
                our_name=f"worker '{self._side.holder.worker_id}'",
                their_name=f"prefill worker '{taken.worker_id}'",
            )
        except FingerprintMismatch as error:
            raise TicketRefused(str(error)) from error

    def _happen(
        self, event: E, attempt: str = "", *, rendezvous: Rendezvous | None = None, **facts: Any
    ) -> list[Step[A]]:
        before = self._session.state
        steps = self._session.step(event, attempt, rendezvous, **facts)
        if any(step.action in (A.DECODE_LOCALLY, A.FAIL) for step in steps):
            self._side.give_ups[f"{before}: {event}"] += 1
        for step in steps:
            self._do[step.action](step.attempt)
        return steps

    def _spawn(self, call: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        return self._side.spawn(call, f"prefill-{what}-{self._task.task_id}")

    # Room.

    def _reserve(self, _: str) -> None:
        self._spawn(self._reserve_room(), "reserve")

    async def _reserve_room(self) -> None:
        room = await self._try("reserve_kv", self._side.host.reserve_kv(self._task.request))
        if room is None:
            self._happen(E.RESERVE_FAILED, rejected=isinstance(self._error, RequestRejected))
            return
        self._side.rooms.open(room.session, self._settings.room_lease)
        if self._session.state in (S.RESERVING, S.REPLACING, S.RENEWING):
            self._room = room
        else:
            self._late_room = room
        self._happen(E.RESERVED)

    def _drop_room(self, _: str) -> None:
        room, self._room = self._room, None
        if room is not None:
            self._spawn(self._drop(room.session, self._import), "drop-room")

    async def _drop(self, room: str, importing: asyncio.Task[None] | None) -> None:
        if importing is not None:
            await asyncio.wait([importing])
        self._side.rooms.settle(room, Outcome.RELEASED)

    def _drop_late_room(self, _: str) -> None:
        room, self._late_room = self._late_room, None
        if room is not None:
            self._side.rooms.settle(room.session, Outcome.RELEASED)

    def _conceal(self, attempt: str) -> None:
        known = self._attempts.get(attempt)
        if known is not None and known.room is not None:
            self._side.rooms.conceal(known.room)
            known.room = None

    def _free_room(self) -> None:
        if self._taken_over is not None:
            self._side.rooms.free(self._taken_over)

    # Talk.

    async def _submit(self) -> None:
        self._asked_at = lease_clock()
        done = await self._try("the prefill queue", _true(self._side.queue.submit(self._task)))
        self._happen(E.SUBMITTED if done else E.SUBMIT_FAILED)

    def _grant(self, attempt: str) -> None:
        known = self._attempts[attempt]
        room = self._room
        assert room is not None
        if known.until is None:
            # The worker's own deadline is for when it does not hear from us; ours comes first.
            seconds = self._settings.prefill_timeout + self._settings.stop_timeout
            if known.taken.rendezvous is Rendezvous.HANDSHAKE:
                seconds += self._settings.kv_transfer_timeout
            if known.taken.rendezvous is not Rendezvous.PULL:
                try:
                    seconds = min(seconds, self._side.rooms.expose(room.session))
                except LeaseRefused as error:
                    logger.error("Request '%s': %s", self._task.request.request_id, error)
                    known.reply(Gone(str(error)))
                    return
                known.room = room.session
            known.until = Deadline.after(seconds)
        known.reply(Proceed(reservation=room, seconds=known.until.remaining()))

    def _refuse(self, attempt: str) -> None:
        self._attempts[attempt].reply(Gone("the request is served otherwise"))

    def _let_go(self, attempt: str) -> None:
        if attempt in self._attempts:
            self._attempts[attempt].reply(Gone("the request is served otherwise"))
            self._spawn(self._settle(attempt, Outcome.RELEASED), "let-go")

    async def _settle(self, attempt: str, outcome: Outcome) -> None:
        known = self._attempts[attempt]
        if outcome is Outcome.RELEASED and self._import is not None:
            await asyncio.wait([self._import])
        question = SettleAttempt(task_id=self._task.task_id, attempt=attempt, outcome=outcome)
        for last in (False, True):
            try:
                await self._side.wire.ask(known.taken.reply_to, question, self._settings.answer_timeout)
            except Unreachable:
                return  # whatever it may still write, it stops before its lease ends
            except WireError as error:
                if last:
                    logger.warning("Request '%s': %s", self._task.request.request_id, error)
            else:
                self._conceal(attempt)
                return

    # KV.

    async def _claim(self, attempt: str) -> None:
        known = self._attempts[attempt]
        assert known.ready is not None
        ticket = known.ready.ticket
        assert ticket is not None
        question = ClaimKv(task_id=self._task.task_id, attempt=attempt, session=ticket.session, nonce=ticket.nonce)
        asked_at = lease_clock()
        ask = self._side.wire.ask(known.taken.reply_to, question, self._settings.answer_timeout)
        answer = await self._try("the prefill worker", ask)
        if isinstance(answer, Claimed):
            self._deadline = Deadline.granted(asked_at, answer.seconds)
            self._happen(E.CLAIMED, attempt)
            return
        if isinstance(answer, ClaimRefused):
            self._error = EngineError(answer.why)
        self._happen(E.CLAIM_FAILED)

    def _begin_import(self, attempt: str) -> None:
        self._import = self._spawn(self._import_kv(attempt), "import")

    async def _import_kv(self, attempt: str) -> None:
        ready, room = self._attempts[attempt].ready, self._room
        assert ready is not None
        assert room is not None
        assert ready.ticket is not None
        deadline = self._deadline or self._attempts[attempt].until
        assert deadline is not None
        seconds = deadline.remaining()
        ticket = msgspec.structs.replace(ready.ticket, expires_in=seconds, mac=b"")
        done = await self._try("import_kv", _true(_within(seconds, self._side.host.import_kv(ticket, room.session))))
        if done and deadline.passed():
            self._error, done = EngineError(_LATE), None
        if done and room.session not in self._side.rooms.live:
            self._error, done = EngineError("The lease of the room for the KV is over."), None
        if done:
            assert self._ready_at is not None
            self._imported_at = lease_clock()
            self._side.times.transfer.observe(self._imported_at - self._ready_at)
            self._side.imported_tokens += max(0, ready.ticket.num_tokens - room.cached_tokens)
        self._happen(E.IMPORTED if done else E.IMPORT_FAILED)

    def _cancel_import(self) -> None:
        if self._import is not None:
            self._import.cancel()

    def _decode(self, attempt: str) -> None:
        room, self._room = self._room, None
        assert room is not None
        self._side.rooms.hand_over(room.session)
        self._taken_over = room.session
        ready = self._attempts[attempt].ready
        self._finish(Plan(Way.IMPORTED, room=room.session, first=ready.first if ready is not None else None))

    def _emit_first(self, attempt: str) -> None:
        ready = self._attempts[attempt].ready
        assert ready is not None
        self._finish(Plan(Way.FIRST, first=ready.first))

    # Ends and deadlines.

    def _finish(self, plan: Plan) -> None:
        self._disarm()
        if plan.way in (Way.LOCAL, Way.FAILED):
            logger.info("Request '%s' %s: %s", self._task.request.request_id, plan.way, self._error)
        if not self._plan.done():
            self._plan.set_result(plan)

    def _arm_meeting(self, attempt: str) -> None:
        until = self._attempts[attempt].until
        assert until is not None
        self._arm(max(0.0, until.remaining() - self._settings.stop_timeout), "prefill and KV transfer")

    def _arm(self, seconds: float, what: str) -> None:
        self._disarm()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._time_out, seconds, what)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self, seconds: float, what: str) -> None:
        self._error = EngineError(f"Waited {seconds:g} s for {what}.")
        self._happen(E.TIMEOUT)

    async def _try(self, what: str, call: Awaitable[T]) -> T | None:
        """The result; None when the call failed, which is then remembered as the reason."""
        try:
            return await call
        except EngineError as error:
            self._error = error
        except Exception as error:
            logger.exception("%s raised for request '%s'.", what, self._task.request.request_id)
            self._error = EngineError(f"{what} failed with {type(error).__name__}.")
        return None


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


async def _true(call: Awaitable[object]) -> bool:
    await call
    return True


async def _within(seconds: float, call: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(seconds):
            await call
    except TimeoutError as error:
        raise EngineError(_LATE) from error
