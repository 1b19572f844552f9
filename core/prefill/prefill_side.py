"""The prefill worker's side of disaggregated prefill: takes tasks as it has room, and drives each to its end."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Iterable
from typing import Any

from core.engine.host import EngineHost
from core.kv.fingerprint import require_match
from core.kv.lease import LeaseTerms
from core.kv.session import KvSessions, SessionCounts
from core.kv.ticket import Holder, TicketKey
from core.messages.engine import Rendezvous
from core.messages.errors import ConfigError, EngineDead, EngineError, RequestRejected
from core.prefill.messages import (
    TASK_SCHEMA,
    Answer,
    AttemptFailed,
    ClaimKv,
    ClaimRefused,
    FailureKind,
    Noted,
    PrefillTask,
    Question,
    SettleAttempt,
)
from core.prefill.prefill_run import PrefillRun
from core.prefill.prefill_table import E
from core.prefill.queue import Prefers, PrefillQueue, QueueUnavailable, Room, Taken
from core.prefill.settings import DisaggSettings
from core.prefill.wire import Wire, WireError

logger = logging.getLogger("dynamo.prefill")

TAKE_WAIT = 5.0
"""Seconds for which one wait for tasks lasts; nothing hangs on it."""
BACK_OFF = (0.1, 0.5, 2.0)
"""Seconds between attempts to reach a queue that cannot be reached."""


class PrefillSide:
    """Owned by a PrefillWorker. `start` once the engine runs; `drain`, then `close`. Both idempotent."""

    def __init__(
        self,
        host: EngineHost,
        queue: PrefillQueue,
        wire: Wire,
        settings: DisaggSettings,
        *,
        worker_id: str,
        key: TicketKey,
        prefers: Prefers | None = None,
    ) -> None:
        """`host`: a started prefill engine. `prefers`: how many prompt tokens of a task its cache holds. `queue` and
        `wire` stay the caller's to close.
        """
        self.host = host
        self.wire = wire
        self.settings = settings
        self.key = key
        self.holder = Holder.new(worker_id)
        self.address = f"prefill.{worker_id}.{self.holder.incarnation}"
        self.sessions = KvSessions(host.release_kv, on_expired=self._expired)
        self.ends: Counter[str] = Counter()
        self._prefers = prefers
        self._taker = queue.taker(worker_id)
        self._runs: dict[str, PrefillRun] = {}
        self._holders: dict[str, PrefillRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._dead: EngineDead | None = None

    async def start(self) -> None:
        """Begin to take tasks."""
        await self.wire.serve(self.address, self._answer)
        self._loop = asyncio.create_task(self._take_tasks(), name=f"prefill-{self.holder.worker_id}")

    async def drain(self) -> None:
        """Take no new tasks; return when those that were taken have ended, by themselves or by their leases."""
        await self._stop_taking()
        while self._running:
            await asyncio.wait(self._running)

    async def close(self) -> None:
        """End what is under way, give its tasks back, release everything."""
        await self._stop_taking()
        for run in list(self._runs.values()):
            run.leave()
        for group in (self._running, self._tasks):
            if group:
                _, late = await asyncio.wait(group, timeout=3 * self.settings.stop_timeout)
                for task in late:
                    logger.error("%s did not end and is given up.", task.get_name())
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)
        await self._taker.close()
        await self.sessions.close()
        await self.wire.withdraw(self.address)

    def spawn(self, call: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something for a run; `close` waits for it."""
        task = asyncio.create_task(call, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def hold(self, run: PrefillRun, session: str, terms: LeaseTerms, nonce: str) -> None:
        """Keep a session under a lease for a run."""
        self.sessions.open(session, terms, nonce=nonce)
        self._holders[session] = run

    def engine_died(self, error: EngineDead) -> None:
        """Take nothing more: every further task would fail."""
        if self._dead is None:
            logger.error("Prefill worker '%s' takes no more tasks: %s", self.holder.worker_id, error)
        self._dead = error
        if self._loop is not None:
            self._loop.cancel()

    def tell_failed(self, task: PrefillTask, attempt: str, kind: FailureKind, error: Exception) -> None:
        """Tell the decode side that an attempt is over. Not being heard is made good by its deadlines."""
        self.ends[kind] += 1
        rejected = error if isinstance(error, RequestRejected) else None
        question = AttemptFailed(
            task_id=task.task_id,
            attempt=attempt,
            kind=kind,
            message=str(error),
            param=rejected.param if rejected else None,
            code=rejected.code if rejected else None,
        )
        self.spawn(self._tell(task, question), f"prefill-tell-{task.task_id}")

    async def _tell(self, task: PrefillTask, question: AttemptFailed) -> None:
        for _ in range(2):
            try:
                await self.wire.ask(task.reply_to, question, self.settings.answer_timeout)
            except WireError as error:
                logger.warning("Task '%s': %s", task.task_id, error)
            else:
                return

    @property
    def under_way(self) -> tuple[int, int]:
        """Tasks that keep the engine busy, and tasks whose KV waits to be fetched."""
        computing = sum(run.computing for run in self._runs.values())
        return computing, len(self._runs) - computing

    def counts(self) -> SessionCounts:
        """Of the sessions that were exported."""
        return self.sessions.counts()

    def check_integrity(self) -> None:
        """Raises `AssertionError` if KV is held for nobody, or is lost."""
        self.sessions.check_integrity()
        held = {run.session for run in self._runs.values() if run.session is not None}
        assert self.sessions.live <= held, f"KV {sorted(self.sessions.live - held)} is held for no attempt"
        assert len(self._running) == len(self._runs), "an attempt is lost"

    async def _take_tasks(self) -> None:
        failures = 0
        while self._dead is None:
            self._changed.clear()
            room = self._room()
            if room.tasks < 1:
                await self._changed.wait()
                continue
            try:
                taken = await self._taker.take(room, TAKE_WAIT, self._prefers)
            except QueueUnavailable as error:
                if failures == 0:
                    logger.error("Prefill worker '%s': %s", self.holder.worker_id, error)
                await asyncio.sleep(BACK_OFF[min(failures, len(BACK_OFF) - 1)])
                failures += 1
                continue
            failures = 0
            for item in taken:
                await self._begin(item)

    async def _bury(self, taken: Taken, kind: FailureKind, why: str) -> None:
        await taken.bury(why)
        self.tell_failed(taken.task, "", kind, EngineError(why))

    async def _begin(self, taken: Taken) -> None:
        try:
            kind = self._choose(taken.task)
        except ConfigError as error:
            logger.error("Prefill worker '%s' cannot serve '%s': %s", self.holder.worker_id, taken.task.task_id, error)
            await self._bury(taken, FailureKind.ABANDONED, str(error))
            return
        if taken.exhausted:
            failure = FailureKind.ABANDONED if taken.silent else FailureKind.POISONED
            did = "vanished with" if taken.silent else "failed on"
            await self._bury(taken, failure, f"{taken.max_attempts} prefill workers {did} this prompt.")
            return
        run = PrefillRun(self, taken, kind)
        self._runs[run.attempt] = run
        runner = asyncio.create_task(run.run(), name=f"prefill-run-{run.attempt}")
        self._running.add(runner)
        runner.add_done_callback(lambda done: self._ended(run, done))

    def _ended(self, run: PrefillRun, done: asyncio.Task[None]) -> None:
        self._running.discard(done)
        self._runs.pop(run.attempt, None)
        if run.session is not None:
            self._holders.pop(run.session, None)
        self._changed.set()
        if not done.cancelled() and (error := done.exception()) is not None:
            logger.error("Attempt '%s' ended with a defect.", run.attempt, exc_info=error)
            if run.session is None:
                return
            self.sessions.free(run.session)

    async def _answer(self, question: Question) -> Answer:
        if isinstance(question, ClaimKv):
            run = self._runs.get(question.attempt)
            if run is None:
                return ClaimRefused(f"Attempt '{question.attempt}' is over; its KV is not held any more.")
            return await run.claim(question)
        if isinstance(question, SettleAttempt):
            run = self._runs.get(question.attempt)
            if run is not None:
                await run.settle(question)
        return Noted()

    def _expired(self, session: str) -> None:
        run = self._holders.get(session)
        if run is not None:
            run.happen(E.EXPIRED)

    def _choose(self, task: PrefillTask) -> Rendezvous:
        """How the KV will move. Raises `ConfigError` when it cannot, for no task of this decode worker."""
        if task.schema != TASK_SCHEMA:
            raise ConfigError(
                f"The task has schema {task.schema}, this prefill worker reads {TASK_SCHEMA}: "
                "run the same version on every worker."
            )
        capabilities = self.host.description.capabilities
        require_match(
            task.fingerprint,
            self.host.info.kv_fingerprint,
            canonical=capabilities.canonical_kv,
            our_name=f"decode worker '{task.decode_worker}'",
            their_name=f"prefill worker '{self.holder.worker_id}'",
        )
        for kind in task.rendezvous:
            if kind in capabilities.rendezvous:
                return kind
        raise ConfigError(
            f"Prefill worker '{self.holder.worker_id}' moves KV by {_listed(capabilities.rendezvous)}, "
            f"decode worker '{task.decode_worker}' by {_listed(task.rendezvous)}: use engines that share a way."
        )

    def _room(self) -> Room:
        computing = sum(run.computing for run in self._runs.values())
        promised = sum(run.uncomputed_tokens for run in self._runs.values())
        block_size = self.host.info.block_size
        free = sum(rank.kv_blocks_total - rank.kv_blocks_used for rank in self.host.load()) * block_size
        # One at a time: what others have time for is left to them.
        tasks = min(1, self.settings.prefill_concurrency - computing)
        return Room(tasks, max(0, free - promised), idle=not self._runs)

    async def _stop_taking(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)


def _listed(kinds: Iterable[Rendezvous]) -> str:
    return ", ".join(sorted(kinds)) or "nothing"
