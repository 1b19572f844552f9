"""The KV sessions of one worker: what it holds for other workers, until when, and how each of them ended.

A prefill worker keeps its exported KV here, a decode worker the rooms that it reserved for KV to come. Every session
ends in exactly one way, so that at any moment

    opened = imported + released + expired + live

and at a quiet one, when nothing is live, `opened = imported + released + expired`. `KvLedger` is the bookkeeping,
without a clock or a task of its own; `KvSessions` adds the expiry task and frees what a session held, once.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
from collections.abc import Awaitable, Callable
from enum import StrEnum
from types import TracebackType
from typing import Self

import msgspec

from core.kv.lease import Clock, LeaseTerms, lease_clock
from core.messages.errors import EngineDead, EngineError

logger = logging.getLogger("dynamo.kv")

FREE_RETRIES = (0.05, 0.5, 2.0, 5.0)
"""Seconds before each further try to free a session whose `release_kv` raised; a defect of the engine, not a rule."""

CLOSE_TIMEOUT = 10.0
"""Seconds that `KvSessions.close` gives the engine to free what is left."""


class LeaseRefused(EngineError):
    """The session cannot be used: it never was, has ended, or is about to. Another prefill may succeed."""

    retryable = True


class Outcome(StrEnum):
    """How a session ended."""

    IMPORTED = "imported"
    """The KV is on the decode side."""
    RELEASED = "released"
    """The user let go of it."""
    EXPIRED = "expired"
    """The lease ended before anybody said a word."""


class SessionCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Where all sessions that were ever opened are now."""

    opened: int
    imported: int
    released: int
    expired: int
    live: int
    retired: int = 0
    """Of the live ones: given up, but a peer may still write to their blocks."""
    freeing: int = 0
    """Ended, and the engine has not yet said that the blocks are free."""
    stuck: int = 0
    """Ended, and the engine refused every time to free them: a leak that needs a restart of the worker."""


class _Session(msgspec.Struct):
    name: str
    nonce: str
    usable_until: float
    until: float
    exposed: bool = False
    retired: bool = False


class KvLedger:
    """Which sessions are live, until when, and how the others ended. Times are given by the caller."""

    def __init__(self) -> None:
        self._live: dict[str, _Session] = {}
        self._heap: list[tuple[float, str]] = []
        self._opened = 0
        self._ended = dict.fromkeys(Outcome, 0)

    def open(self, name: str, terms: LeaseTerms, now: float, *, nonce: str = "") -> None:
        """Hold a session under a lease that begins now. Raises `ValueError` for a name that is live already."""
        if name in self._live:
            raise ValueError(f"KV session '{name}' is held already; the engine gave out one name twice")
        session = _Session(name, nonce, now + terms.usable, now + terms.lease)
        self._live[name] = session
        if len(self._heap) > 64 + 2 * len(self._live):
            self._heap = [(live.until, live.name) for live in self._live.values()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (session.until, name))
        self._opened += 1

    def claim(self, name: str, nonce: str, now: float) -> float:
        """Seconds from now for which the session may be used. Raises `LeaseRefused` when it may not."""
        session = self._live.get(name)
        if session is None or session.retired:
            raise LeaseRefused(f"KV session '{name}' is not held here: it was released, has expired, or never existed.")
        if session.nonce != nonce:
            raise LeaseRefused(f"KV session '{name}' is held for another ticket than the one presented.")
        if now >= session.usable_until:
            raise LeaseRefused(
                f"The lease of KV session '{name}' is over in {max(0.0, session.until - now):.3f} s, too soon to "
                "begin a transfer. If transfers are slow here, raise kv-lease."
            )
        return session.usable_until - now

    def expose(self, name: str, now: float) -> float:
        """Let one peer write to the session's blocks; gives the seconds for which it may. They are not freed before
        `conceal`, or the lease's end. Raises `LeaseRefused` when the session has ended or is exposed already.
        """
        session = self._live.get(name)
        if session is None or session.retired or session.exposed or now >= session.usable_until:
            raise LeaseRefused(f"KV session '{name}' takes no writer: it has ended, is about to, or has one.")
        session.exposed = True
        return session.usable_until - now

    def conceal(self, name: str) -> Outcome | None:
        """The peer writes no more. Gives the outcome if the session was only waiting for that: it has now ended."""
        session = self._live.get(name)
        if session is None:
            return None
        session.exposed = False
        return self._end(session, Outcome.RELEASED) if session.retired else None

    def settle(self, name: str, outcome: Outcome) -> bool:
        """End a session; whether it ended now. False: it was over already, or a peer may still write to it, in which
        case it is retired and ends with `conceal` or its lease.
        """
        session = self._live.get(name)
        if session is None:
            return False
        if session.exposed and outcome is not Outcome.IMPORTED:
            session.retired = True
            return False
        self._end(session, outcome)
        return True

    def expire(self, now: float) -> list[tuple[str, Outcome]]:
        """End and name the sessions whose lease is over. A retired one counts as what it is: released."""
        ended = []
        while self._heap and self._heap[0][0] <= now:
            until, name = heapq.heappop(self._heap)
            session = self._live.get(name)
            if session is not None and session.until == until:
                outcome = Outcome.RELEASED if session.retired else Outcome.EXPIRED
                ended.append((name, self._end(session, outcome)))
        return ended

    def next_expiry(self) -> float | None:
        """When `expire` has something to do next; None when nothing is live."""
        while self._heap:
            until, name = self._heap[0]
            session = self._live.get(name)
            if session is not None and session.until == until:
                return until
            heapq.heappop(self._heap)
        return None

    @property
    def live(self) -> frozenset[str]:
        """Names of the sessions that are held."""
        return frozenset(self._live)

    def counts(self) -> SessionCounts:
        """The figures; `freeing` and `stuck` are the owner's to fill in."""
        return SessionCounts(
            opened=self._opened,
            imported=self._ended[Outcome.IMPORTED],
            released=self._ended[Outcome.RELEASED],
            expired=self._ended[Outcome.EXPIRED],
            live=len(self._live),
            retired=sum(session.retired for session in self._live.values()),
        )

    def check_integrity(self) -> None:
        """Raises `AssertionError` if a session is lost or counted twice."""
        assert self._opened == sum(self._ended.values()) + len(self._live), (
            f"{self._opened} KV sessions were opened, but {self._ended} ended and {len(self._live)} are live"
        )
        queued = {name for _, name in self._heap}
        assert queued >= self._live.keys(), f"no expiry is planned for {sorted(self._live.keys() - queued)}"
        for session in self._live.values():
            assert session.usable_until < session.until, f"lease of '{session.name}' has no guard"
            assert session.exposed or not session.retired, f"'{session.name}' is retired and nobody writes to it"

    def _end(self, session: _Session, outcome: Outcome) -> Outcome:
        del self._live[session.name]
        self._ended[outcome] += 1
        return outcome


class KvSessions:
    """The sessions of one worker, and the tasks that expire and free them. `async with` ends them all."""

    def __init__(
        self,
        free: Callable[[str], Awaitable[None]],
        *,
        on_expired: Callable[[str], None] | None = None,
        clock: Clock = lease_clock,
    ) -> None:
        """`free`: frees what a session holds (`EngineHost.release_kv`); called once a session, whatever its end.
        `on_expired`: hears which session's lease is over.
        """
        self._free = free
        self._on_expired = on_expired
        self._clock = clock
        self._ledger = KvLedger()
        self._wake = asyncio.Event()
        self._sleeps_until = math.inf
        self._expiry: asyncio.Task[None] | None = None
        self._freeing: set[asyncio.Task[None]] = set()
        self._stuck: set[str] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def open(self, name: str, terms: LeaseTerms, *, nonce: str = "") -> None:
        """See `KvLedger.open`."""
        now = self._clock()
        self._ledger.open(name, terms, now, nonce=nonce)
        if self._expiry is None:
            self._expiry = asyncio.create_task(self._expire(), name="kv-lease-expiry")
        if now + terms.lease < self._sleeps_until:
            self._wake.set()

    def claim(self, name: str, nonce: str) -> float:
        """See `KvLedger.claim`."""
        return self._ledger.claim(name, nonce, self._clock())

    def expose(self, name: str) -> float:
        """See `KvLedger.expose`."""
        return self._ledger.expose(name, self._clock())

    def conceal(self, name: str) -> None:
        """See `KvLedger.conceal`."""
        if self._ledger.conceal(name) is not None:
            self._begin_free(name)

    def settle(self, name: str, outcome: Outcome) -> bool:
        """See `KvLedger.settle`. Idempotent, never waits; `freed` waits."""
        ended = self._ledger.settle(name, outcome)
        if ended:
            self._begin_free(name)
        return ended

    def hand_over(self, name: str) -> bool:
        """End a session as imported and leave its blocks to `decode`, which is about to use them; the caller frees
        them with `free` when the stream has ended. False, and nothing changed, when the session was over already.
        """
        return self._ledger.settle(name, Outcome.IMPORTED)

    def free(self, name: str) -> None:
        """Free blocks that were handed over, or that no session was opened for. Never waits; `freed` waits."""
        self._begin_free(name)

    async def freed(self) -> None:
        """Return when everything that has ended so far is free."""
        while self._freeing:
            await asyncio.wait(self._freeing)

    @property
    def live(self) -> frozenset[str]:
        """Names of the sessions that are held."""
        return self._ledger.live

    def counts(self) -> SessionCounts:
        """For metrics and `check_integrity`; cheap."""
        return msgspec.structs.replace(self._ledger.counts(), freeing=len(self._freeing), stuck=len(self._stuck))

    def check_integrity(self) -> None:
        """Raises `AssertionError` if a session was lost, counted twice, or could not be freed."""
        self._ledger.check_integrity()
        assert not self._stuck, f"the engine does not free KV sessions {sorted(self._stuck)}; restart the worker"
        if self._ledger.live:
            assert self._expiry is not None, "sessions are live and nothing expires them"
            assert not self._expiry.done(), "sessions are live and nothing expires them"

    async def close(self) -> None:
        """Release everything that is live, exposed or not, and end all tasks. Idempotent."""
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)
            self._expiry = None
        for name in self._ledger.live:
            if not self._ledger.settle(name, Outcome.RELEASED):
                self._ledger.conceal(name)
            self._begin_free(name)
        if self._freeing:
            _, hanging = await asyncio.wait(self._freeing, timeout=CLOSE_TIMEOUT)
            for task in hanging:
                logger.error("%s did not end within %g s; it is given up.", task.get_name(), CLOSE_TIMEOUT)
                task.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)

    async def _expire(self) -> None:
        while True:
            for name, outcome in self._ledger.expire(self._clock()):
                logger.warning("The lease of KV session '%s' is over (%s); its blocks are freed.", name, outcome)
                self._begin_free(name)
                if self._on_expired is not None:
                    self._on_expired(name)
            self._wake.clear()
            upcoming = self._ledger.next_expiry()
            self._sleeps_until = math.inf if upcoming is None else upcoming
            try:
                async with asyncio.timeout(None if upcoming is None else max(0.0, upcoming - self._clock())):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _begin_free(self, name: str) -> None:
        task = asyncio.create_task(self._free_session(name), name=f"kv-free-{name}")
        self._freeing.add(task)
        task.add_done_callback(self._freeing.discard)

    async def _free_session(self, name: str) -> None:
        for delay in (*FREE_RETRIES, None):
            try:
                await self._free(name)
            except EngineDead:
                return  # what a dead engine held is gone with it
            except Exception:
                logger.exception("release_kv raised for KV session '%s', which it must not.", name)
            else:
                return
            if delay is None:
                self._stuck.add(name)
                return
            await asyncio.sleep(delay)
