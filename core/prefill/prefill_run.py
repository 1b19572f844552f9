"""One attempt at a task on the prefill side: carries out what the state machine says, one action after the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from core.kv.lease import Deadline, LeaseTerms, lease_clock
from core.kv.session import LeaseRefused, Outcome
from core.kv.ticket import seal
from core.messages.engine import Rendezvous
from core.messages.errors import EngineDead, EngineDraining, EngineError, Overloaded, RequestRejected
from core.messages.kv import KvReservation, KvTicket
from core.messages.output import Delta, FinishReason, PrefillResult
from core.prefill.messages import (
    Answer,
    Claimed,
    ClaimKv,
    ClaimRefused,
    FailureKind,
    Gone,
    KvReady,
    Noted,
    Proceed,
    SettleAttempt,
    TaskTaken,
)
from core.prefill.prefill_table import A, E, S
from core.prefill.queue import Taken
from core.prefill.session import WorkerSession
from core.prefill.wire import Unreachable, WireError

if TYPE_CHECKING:
    from core.prefill.prefill_side import PrefillSide

logger = logging.getLogger("dynamo.prefill")

COMPUTING = frozenset({S.IDLE, S.ASKING, S.PREFILLING, S.OPENING, S.MEETING})


class PrefillRun:
    """Owned by a `PrefillSide`, which runs `run` as a task. Over when `run` returns: nothing is held or computed."""

    def __init__(self, side: PrefillSide, taken: Taken, rendezvous: Rendezvous) -> None:
        self.task = taken.task
        self.attempt = f"{taken.task.task_id}/{secrets.token_hex(6)}"
        """Also the engine's request id of the prefill, so that no two tries ever share one."""
        self.session: str | None = None
        """The KV session, once it is held under a lease."""
        self._side = side
        self._settings = side.settings
        self._taken = taken
        self._rendezvous = rendezvous
        self._machine = WorkerSession(rendezvous, last=taken.last)
        self._events: asyncio.Queue[tuple[E, dict[str, Any], asyncio.Future[None] | None]] = asyncio.Queue()
        self._actions: list[A] = []
        self._over = False
        self._timer: asyncio.TimerHandle | None = None
        self._asked_at = 0.0
        self._until: Deadline | None = None
        self._reservation: KvReservation | None = None
        self._asking: asyncio.Task[None] | None = None
        self._prefill: asyncio.Task[None] | None = None
        self._export: asyncio.Task[None] | None = None
        self._result: PrefillResult | None = None
        self._ticket: KvTicket | None = None
        self._error: Exception = EngineError("the prefill failed")
        self._claim: Answer = ClaimRefused("the attempt is over")
        self._nonce = ""
        self._do: dict[A, Callable[[], Awaitable[None]]] = {
            A.ASK: self._begin_ask,
            A.PREFILL: self._begin_prefill,
            A.ABORT_PREFILL: self._abort_prefill,
            A.EXPORT: self._begin_export,
            A.CANCEL_EXPORT: self._cancel_export,
            A.RELEASE: self._release,
            A.OPEN_LEASE: self._open_lease,
            A.END_LEASE: lambda: self._end_lease(self._machine.facts.outcome or Outcome.RELEASED),
            A.END_IMPORTED: lambda: self._end_lease(Outcome.IMPORTED),
            A.SEND_READY: self._spawned(self._send_ready, "ready"),
            A.SEND_FAILED: self._send_failed,
            A.ANSWER_CLAIM: self._answer_claim,
            A.REFUSE_CLAIM: self._refuse_claim,
            A.ACK: taken.ack,
            A.RETRY: taken.retry,
            A.RETURN: taken.give_back,
            A.BURY: lambda: taken.bury(str(self._error)),
            A.ARM_ANSWER: self._arm_answer,
            A.ARM_PREFILL: self._arm_prefill,
            A.DISARM: self._disarm,
        }

    @property
    def computing(self) -> bool:
        """Whether it keeps the engine busy, rather than waiting to be fetched."""
        return self._machine.state in COMPUTING

    @property
    def uncomputed_tokens(self) -> int:
        """Prompt tokens that the engine has been promised and does not count yet."""
        return self.task.tokens if self._prefill is None and not self._machine.over else 0

    async def run(self) -> None:
        """From asking to the end."""
        self.happen(E.START)
        try:
            while not (self._machine.over and self._events.empty() and self._quiet()):
                event, facts, done = await self._events.get()
                self._actions = self._machine.step(event, **facts)
                for action in self._actions:
                    await self._do[action]()
                if done is not None and not done.done():
                    done.set_result(None)
        finally:
            self._over = True
            await self._disarm()
            while not self._events.empty():
                _, _, done = self._events.get_nowait()
                if done is not None and not done.done():
                    done.set_result(None)

    def leave(self) -> None:
        """This worker stops now."""
        self._error = EngineDraining(f"Prefill worker '{self._side.holder.worker_id}' leaves.")
        self.happen(E.LEAVE)

    def happen(self, event: E, **facts: Any) -> None:
        """Let the machine know."""
        self._events.put_nowait((event, facts, None))

    async def settle(self, question: SettleAttempt) -> Answer:
        """The decode side needs the attempt no more. Answered when nothing is written any more."""
        await self._handled(E.SETTLED, outcome=question.outcome)
        return Noted()

    async def claim(self, question: ClaimKv) -> Answer:
        """The decode side is about to read."""
        if question.session != self.session or question.nonce != self._nonce:
            return ClaimRefused(f"KV session '{question.session}' is not the one of this attempt's ticket.")
        await self._handled(E.CLAIM)
        return self._claim

    async def _handled(self, event: E, **facts: Any) -> None:
        if not self._over:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._events.put_nowait((event, facts, done))
            await done

    def _quiet(self) -> bool:
        return all(task is None or task.done() for task in (self._asking, self._prefill, self._export))

    # Talk.

    async def _begin_ask(self) -> None:
        self._asking = self._side.spawn(self._ask(), f"prefill-ask-{self.attempt}")

    async def _ask(self) -> None:
        question = TaskTaken(
            task_id=self.task.task_id,
            attempt=self.attempt,
            delivery=self._taken.delivery,
            worker_id=self._side.holder.worker_id,
            incarnation=self._side.holder.incarnation,
            reply_to=self._side.address,
            rendezvous=self._rendezvous,
        )
        self._asked_at = lease_clock()
        answer = await self._question(question, self._settings.answer_timeout + self._settings.reserve_timeout)
        if isinstance(answer, Proceed):
            self._reservation = answer.reservation
            self._until = Deadline.granted(self._asked_at, answer.seconds)
            self.happen(E.PROCEED)
        elif answer is not None:
            self.happen(E.GONE)

    async def _send_ready(self) -> None:
        ticket = self._ticket
        first = self._result.first if self._result is not None else None
        question = KvReady(task_id=self.task.task_id, attempt=self.attempt, ticket=ticket, first=first)
        answer = await self._question(question, self._settings.answer_timeout)
        if isinstance(answer, Gone):
            self.happen(E.SETTLED, outcome=Outcome.RELEASED)

    async def _question(self, question: TaskTaken | KvReady, timeout: float) -> Answer | None:  # noqa: ASYNC109
        try:
            return await self._side.wire.ask(self.task.reply_to, question, timeout)
        except Unreachable:
            self.happen(E.NOBODY)
        except WireError as error:
            logger.warning("Task '%s': %s", self.task.task_id, error)
            self.happen(E.NO_ANSWER)
        return None

    async def _send_failed(self) -> None:
        error = self._error
        kind = FailureKind.RETRYABLE
        if A.BURY in self._actions:
            kind = FailureKind.POISONED
        elif A.ACK in self._actions:
            kind = FailureKind.REJECTED
        self._side.tell_failed(self.task, self.attempt, kind, error)

    # Work.

    async def _begin_prefill(self) -> None:
        self._prefill = self._side.spawn(self._run_prefill(), f"prefill-{self.attempt}")

    async def _run_prefill(self) -> None:
        request = msgspec.structs.replace(self.task.request, request_id=self.attempt)
        try:
            result = await self._side.host.prefill(request, self._room_to_write())
        except asyncio.CancelledError:
            self.happen(E.PREFILL_FAILED)
            raise
        except EngineError as error:
            self._engine_failed(E.PREFILL_FAILED, error)
        except Exception as error:
            logger.exception("prefill raised for task '%s'.", self.task.task_id)
            self._error = EngineError(f"prefill failed with {type(error).__name__}.")
            self.happen(E.PREFILL_FAILED)
        else:
            self._result = result
            finish = result.first.finish
            self.happen(
                E.PREFILLED,
                aborted=finish is FinishReason.ABORT,
                ended=finish not in (None, FinishReason.ABORT) and self._rendezvous is not Rendezvous.HANDSHAKE,
            )

    async def _abort_prefill(self) -> None:
        task = self._prefill
        if task is None:
            return
        if not task.done():
            with contextlib.suppress(EngineError):
                await self._side.host.abort(self.attempt)
            await asyncio.wait([task], timeout=self._settings.stop_timeout)
            if not task.done():
                logger.error(
                    "The engine did not end prefill '%s' within %g s.", self.attempt, self._settings.stop_timeout
                )
                task.cancel()
                await asyncio.wait([task])
        await self._release()

    async def _begin_export(self) -> None:
        self._export = self._side.spawn(self._run_export(), f"prefill-export-{self.attempt}")

    async def _run_export(self) -> None:
        session = self.attempt if self._result is None else self._result.session
        try:
            self._ticket = await self._side.host.export_kv(session, self._room_to_write())
        except asyncio.CancelledError:
            self.happen(E.EXPORT_FAILED)
            raise
        except EngineError as error:
            self._engine_failed(E.EXPORT_FAILED, error)
        except Exception as error:
            logger.exception("export_kv raised for task '%s'.", self.task.task_id)
            self._error = EngineError(f"export_kv failed with {type(error).__name__}.")
            self.happen(E.EXPORT_FAILED)
        else:
            self.happen(E.EXPORTED)

    async def _cancel_export(self) -> None:
        if self._export is not None and not self._export.done():
            self._export.cancel()
            await asyncio.wait([self._export])

    def _room_to_write(self) -> KvReservation | None:
        if self._reservation is None or self._until is None or self._rendezvous is Rendezvous.PULL:
            return None
        return msgspec.structs.replace(self._reservation, expires_in=self._until.remaining())

    # What is held.

    async def _release(self) -> None:
        """Whatever the engine may hold for this attempt without a lease."""
        if self.session is not None:
            return
        names = {self.attempt} if self._rendezvous is Rendezvous.HANDSHAKE else set()
        if self._result is not None:
            names.add(self._result.session)
        for name in names:
            self._side.sessions.free(name)

    async def _open_lease(self) -> None:
        terms, ticket = self._settings.lease, self._ticket
        first: Delta | None = None
        if ticket is not None:
            terms = LeaseTerms.of(min(terms.lease, ticket.expires_in))
            session = ticket.session
            first = self._result.first if self._result is not None else None
        else:
            assert self._result is not None
            session = self._result.session
        if ticket is not None:
            self._ticket = ticket = seal(
                ticket,
                self._side.key,
                holder=self._side.holder,
                audience=self.task.decode_worker,
                request_id=self.task.request.request_id,
                expires_in=terms.usable,
                first=first,
            )
            self._nonce = ticket.nonce
        self.session = session
        self._side.hold(self, session, terms, self._nonce)

    async def _end_lease(self, outcome: Outcome) -> None:
        if self.session is not None:
            self._side.sessions.settle(self.session, outcome)

    async def _answer_claim(self) -> None:
        assert self.session is not None
        try:
            self._claim = Claimed(self._side.sessions.claim(self.session, self._nonce))
        except LeaseRefused as error:
            self._claim = ClaimRefused(str(error))

    async def _refuse_claim(self) -> None:
        self._claim = ClaimRefused(f"Attempt '{self.attempt}' holds no KV any more.")

    # Deadlines.

    async def _arm_answer(self) -> None:
        self._arm(self._settings.answer_timeout + self._settings.reserve_timeout, "the decode worker to answer")

    async def _arm_prefill(self) -> None:
        assert self._until is not None
        self._arm(self._until.remaining(), "the prefill")

    def _arm(self, seconds: float, what: str) -> None:
        if self._timer is not None:
            self._timer.cancel()

        def passed() -> None:
            self._error = EngineError(f"Waited {seconds:g} s for {what}.")
            self.happen(E.TIMEOUT)

        self._timer = asyncio.get_running_loop().call_later(seconds, passed)

    async def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _engine_failed(self, event: E, error: EngineError) -> None:
        self._error = error
        if isinstance(error, EngineDead):
            self._side.engine_died(error)
        self.happen(
            event,
            rejected=isinstance(error, RequestRejected),
            blameless=isinstance(error, Overloaded | EngineDraining | EngineDead),
        )

    def _spawned(self, call: Callable[[], Coroutine[Any, Any, None]], what: str) -> Callable[[], Awaitable[None]]:
        async def begin() -> None:
            self._side.spawn(call(), f"prefill-{what}-{self.attempt}")

        return begin
