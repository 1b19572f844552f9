"""The prefill worker's half of one attempt at a task, every transition of it."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import msgspec

from core.kv.session import Outcome
from core.messages.engine import Rendezvous
from core.prefill.machine import Row, Table


class S(StrEnum):
    """Where the attempt is."""

    IDLE = "idle"
    ASKING = "asking"
    """Is the answer still wanted?"""
    PREFILLING = "prefilling"
    EXPORTING = "exporting"
    OPENING = "opening"
    """handshake: both legs of this side have begun, the address is not known yet."""
    MEETING = "meeting"
    """handshake: the address is told, the prefill runs until the decode side has the KV."""
    HOLDING = "holding"
    """The KV lies ready under its lease."""
    CLOSING = "closing"
    """handshake: the decode side has the KV, the prefill is about to return."""
    ENDED = "ended"


class E(StrEnum):
    """What can happen."""

    START = "start"
    PROCEED = "proceed"
    GONE = "gone"
    NOBODY = "nobody there"
    """The decode worker's address is not served any more."""
    NO_ANSWER = "no answer"
    PREFILLED = "prefilled"
    PREFILL_FAILED = "prefill failed"
    EXPORTED = "exported"
    EXPORT_FAILED = "export failed"
    CLAIM = "claim"
    SETTLED = "settled"
    """By the decode side; also its answer that what we announced is not wanted."""
    EXPIRED = "expired"
    """The lease is over and the ledger has freed the blocks."""
    TIMEOUT = "timeout"
    LEAVE = "leave"
    """This worker stops now."""


class A(StrEnum):
    """What to do about it. An action is over before the next one begins."""

    ASK = "ask"
    PREFILL = "prefill"
    ABORT_PREFILL = "abort prefill"
    """Over when nothing is computed or written any more; what it left behind is released."""
    EXPORT = "export"
    CANCEL_EXPORT = "cancel export"
    RELEASE = "release"
    """Before there is a lease."""
    OPEN_LEASE = "open lease"
    END_LEASE = "end lease"
    """With the event's outcome; released if it has none."""
    END_IMPORTED = "end lease as imported"
    SEND_READY = "send ready"
    SEND_FAILED = "send failed"
    ANSWER_CLAIM = "answer claim"
    REFUSE_CLAIM = "refuse claim"
    ACK = "acknowledge"
    """The task is done with: imported, or let go."""
    RETRY = "retry"
    """Back into the queue; counts as a failed try."""
    RETURN = "return"
    """Back into the queue without blame."""
    BURY = "dead letter"
    ARM_ANSWER = "arm answer deadline"
    ARM_PREFILL = "arm prefill deadline"
    DISARM = "disarm"


class PrefillFacts(msgspec.Struct):
    """What guards look at. The last ones describe the event."""

    last: bool = False
    """No further try is allowed."""
    rendezvous: Rendezvous = Rendezvous.PULL
    rejected: bool = False
    """The engine says that the request is at fault."""
    blameless: bool = False
    """The engine had no room or leaves: says nothing about the task."""
    aborted: bool = False
    """The prefill ended by an abort that this side did not ask for."""
    ended: bool = False
    """The sequence ended with its first token."""
    outcome: Outcome | None = None


GUARDS: dict[str, Callable[[PrefillFacts], bool]] = {
    "handshake": lambda f: f.rendezvous is Rendezvous.HANDSHAKE,
    "rejected": lambda f: f.rejected,
    "blameless": lambda f: f.blameless,
    "last try": lambda f: f.last,
    "aborted, last try": lambda f: f.aborted and f.last,
    "aborted": lambda f: f.aborted,
    "ended by its first token": lambda f: f.ended,
    "imported": lambda f: f.outcome is Outcome.IMPORTED,
}

WORKING = (S.PREFILLING, S.EXPORTING, S.OPENING)
ALL_BUT_IDLE = tuple(state for state in S if state is not S.IDLE)

_STOP: dict[S, tuple[A, ...]] = {
    S.PREFILLING: (A.ABORT_PREFILL,),
    S.EXPORTING: (A.CANCEL_EXPORT, A.RELEASE),
    S.OPENING: (A.CANCEL_EXPORT, A.ABORT_PREFILL, A.RELEASE),
    S.MEETING: (A.ABORT_PREFILL, A.END_LEASE),
    S.HOLDING: (A.END_LEASE,),
}
"""How each state is left by force: everything that runs is ended, everything that is held is freed."""


def _row(states: S | tuple[S, ...], event: E, when: str, to: S | None, *do: A, why: str = "") -> Row[S, E, A]:
    return Row((states,) if isinstance(states, S) else states, event, when, to, do, why)


def _never(event: E, *states: S, why: str = "late, or said twice") -> Row[S, E, A]:
    return Row(states, event, "", None, (), why)


def _failure(state: S, event: E, *, why: str = "") -> list[Row[S, E, A]]:
    """The rows for a failure that may have a next try."""
    stop = (A.DISARM, *_STOP[state])
    return [
        _row(state, event, "last try", S.ENDED, *stop, A.BURY, A.SEND_FAILED, why=why),
        _row(state, event, "", S.ENDED, *stop, A.SEND_FAILED, A.RETRY, why=why),
    ]


def _engine_failure(state: S, event: E) -> list[Row[S, E, A]]:
    stop = (A.DISARM, *_STOP[state])
    return [
        _row(state, event, "rejected", S.ENDED, *stop, A.SEND_FAILED, A.ACK, why="nobody can serve it"),
        _row(state, event, "blameless", S.ENDED, *stop, A.SEND_FAILED, A.RETURN),
        *_failure(state, event),
    ]


TABLE: Table[S, E, A, PrefillFacts] = Table(
    [
        _row(S.IDLE, E.START, "", S.ASKING, A.ARM_ANSWER, A.ASK, why="no work for a client that has gone"),
        _row(S.ASKING, E.PROCEED, "handshake", S.OPENING, A.ARM_PREFILL, A.PREFILL, A.EXPORT),
        _row(S.ASKING, E.PROCEED, "", S.PREFILLING, A.ARM_PREFILL, A.PREFILL),
        _row(S.ASKING, E.GONE, "", S.ENDED, A.DISARM, A.ACK),
        _row(S.ASKING, E.NOBODY, "", S.ENDED, A.DISARM, A.ACK, why="the decode worker is dead: nobody waits"),
        _row(S.ASKING, E.SETTLED, "", S.ENDED, A.DISARM, A.ACK),
        _row(S.ASKING, E.NO_ANSWER, "", S.ENDED, A.DISARM, A.RETURN),
        _row(S.ASKING, E.TIMEOUT, "", S.ENDED, A.RETURN),
        _row(S.ASKING, E.LEAVE, "", S.ENDED, A.DISARM, A.RETURN),
        # pull and push: one step after the other.
        _row(S.PREFILLING, E.PREFILLED, "aborted, last try", S.ENDED, A.DISARM, A.RELEASE, A.BURY, A.SEND_FAILED),
        _row(S.PREFILLING, E.PREFILLED, "aborted", S.ENDED, A.DISARM, A.RELEASE, A.SEND_FAILED, A.RETRY),
        _row(
            S.PREFILLING,
            E.PREFILLED,
            "ended by its first token",
            S.HOLDING,
            A.DISARM,
            A.OPEN_LEASE,
            A.SEND_READY,
            why="without a ticket",
        ),
        _row(S.PREFILLING, E.PREFILLED, "", S.EXPORTING, A.EXPORT),
        *_engine_failure(S.PREFILLING, E.PREFILL_FAILED),
        _row(S.EXPORTING, E.EXPORTED, "", S.HOLDING, A.DISARM, A.OPEN_LEASE, A.SEND_READY),
        *_engine_failure(S.EXPORTING, E.EXPORT_FAILED),
        # handshake: both at once.
        _row(S.OPENING, E.EXPORTED, "", S.MEETING, A.OPEN_LEASE, A.SEND_READY),
        _row(
            S.OPENING,
            E.PREFILLED,
            "aborted, last try",
            S.ENDED,
            A.DISARM,
            A.CANCEL_EXPORT,
            A.RELEASE,
            A.BURY,
            A.SEND_FAILED,
        ),
        _row(S.OPENING, E.PREFILLED, "aborted", S.ENDED, A.DISARM, A.CANCEL_EXPORT, A.RELEASE, A.SEND_FAILED, A.RETRY),
        _row(S.OPENING, E.PREFILLED, "", S.EXPORTING, why="returned before the address was known"),
        *_engine_failure(S.OPENING, E.PREFILL_FAILED),
        *_engine_failure(S.OPENING, E.EXPORT_FAILED),
        _row(S.MEETING, E.PREFILLED, "aborted, last try", S.ENDED, A.DISARM, A.END_LEASE, A.BURY, A.SEND_FAILED),
        _row(S.MEETING, E.PREFILLED, "aborted", S.ENDED, A.DISARM, A.END_LEASE, A.SEND_FAILED, A.RETRY),
        _row(S.MEETING, E.PREFILLED, "", S.HOLDING, A.DISARM),
        *_engine_failure(S.MEETING, E.PREFILL_FAILED),
        _row(S.MEETING, E.SETTLED, "imported", S.CLOSING, A.ACK),
        _row(S.CLOSING, E.PREFILLED, "", S.ENDED, A.DISARM, A.END_IMPORTED),
        _row(S.CLOSING, E.PREFILL_FAILED, "", S.ENDED, A.DISARM, A.END_IMPORTED),
        _row(S.CLOSING, E.TIMEOUT, "", S.ENDED, A.ABORT_PREFILL, A.END_IMPORTED),
        _row(S.CLOSING, E.EXPIRED, "", S.ENDED, A.DISARM, A.ABORT_PREFILL),
        _row(S.CLOSING, E.LEAVE, "", S.ENDED, A.DISARM, A.ABORT_PREFILL, A.END_IMPORTED),
        # The end.
        _row(S.HOLDING, E.SETTLED, "", S.ENDED, A.END_LEASE, A.ACK),
        _row(S.HOLDING, E.NOBODY, "", S.ENDED, A.END_LEASE, A.ACK, why="the decode worker is dead: nobody waits"),
        _row(S.HOLDING, E.NO_ANSWER, "", None, why="it may have heard; the lease decides"),
        _row(S.HOLDING, E.EXPIRED, "", S.ENDED, A.RETURN, why="the next worker asks again whether it is wanted"),
        _row(S.HOLDING, E.LEAVE, "", S.ENDED, A.END_LEASE, A.SEND_FAILED, A.RETURN),
        _row(S.MEETING, E.NOBODY, "", S.ENDED, A.DISARM, *_STOP[S.MEETING], A.ACK),
        _row(S.MEETING, E.NO_ANSWER, "", None, why="it may have heard; the deadline decides"),
        *_failure(S.MEETING, E.EXPIRED),
        *_failure(S.MEETING, E.TIMEOUT),
        _row(S.MEETING, E.LEAVE, "", S.ENDED, A.DISARM, *_STOP[S.MEETING], A.SEND_FAILED, A.RETURN),
        _row(
            S.MEETING,
            E.SETTLED,
            "",
            S.ENDED,
            A.DISARM,
            *_STOP[S.MEETING],
            A.ACK,
            why="one leg failed: so does the other, at once",
        ),
        *(row for state in WORKING for row in _failure(state, E.TIMEOUT)),
        *(_row(state, E.SETTLED, "", S.ENDED, A.DISARM, *_STOP[state], A.ACK, why="let go") for state in WORKING),
        *(_row(state, E.LEAVE, "", S.ENDED, A.DISARM, *_STOP[state], A.SEND_FAILED, A.RETURN) for state in WORKING),
        _row((S.MEETING, S.HOLDING), E.CLAIM, "", None, A.ANSWER_CLAIM),
        _row((S.ASKING, *WORKING, S.CLOSING, S.ENDED), E.CLAIM, "", None, A.REFUSE_CLAIM),
        # What comes late.
        _row(S.ENDED, E.PREFILLED, "", None, A.RELEASE),
        _row(S.ENDED, E.EXPORTED, "", None, A.RELEASE),
        _never(E.PREFILL_FAILED, S.ENDED),
        _never(E.EXPORT_FAILED, S.ENDED),
        _row(S.ENDED, E.PROCEED, "", None, A.SEND_FAILED, why="told to proceed too late: nobody is here any more"),
        _never(E.GONE, S.ENDED),
        _never(E.NOBODY, S.CLOSING, S.ENDED),
        _never(E.NO_ANSWER, S.CLOSING, S.ENDED),
        _never(E.SETTLED, S.CLOSING, S.ENDED),
        _never(E.EXPIRED, S.ENDED),
        _never(E.TIMEOUT, S.HOLDING, S.ENDED, why="disarmed in the same breath"),
        _never(E.LEAVE, S.ENDED),
    ],
    GUARDS,
)

REACHABLE: dict[E, tuple[S, ...]] = {
    E.START: (S.IDLE,),
    E.PROCEED: (S.ASKING, S.ENDED),
    E.GONE: (S.ASKING, S.ENDED),
    E.NOBODY: (S.ASKING, S.MEETING, S.HOLDING, S.CLOSING, S.ENDED),
    E.NO_ANSWER: (S.ASKING, S.MEETING, S.HOLDING, S.CLOSING, S.ENDED),
    E.PREFILLED: (S.PREFILLING, S.OPENING, S.MEETING, S.CLOSING, S.ENDED),
    E.PREFILL_FAILED: (S.PREFILLING, S.OPENING, S.MEETING, S.CLOSING, S.ENDED),
    E.EXPORTED: (S.EXPORTING, S.OPENING, S.ENDED),
    E.EXPORT_FAILED: (S.EXPORTING, S.OPENING, S.ENDED),
    E.CLAIM: ALL_BUT_IDLE,
    E.SETTLED: ALL_BUT_IDLE,
    E.EXPIRED: (S.MEETING, S.HOLDING, S.CLOSING, S.ENDED),
    E.TIMEOUT: ALL_BUT_IDLE,
    E.LEAVE: ALL_BUT_IDLE,
}
"""In which states an event can come at all; the rest would be a defect, and raises."""
