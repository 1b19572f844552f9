"""The decode worker's half of a remote prefill, every transition of it."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import msgspec

from core.messages.engine import Rendezvous
from core.prefill.machine import Row, Table
from core.prefill.messages import FailureKind


class S(StrEnum):
    """Where the decode side is."""

    IDLE = "idle"
    RESERVING = "reserving"
    QUEUED = "queued"
    """The task waits for a worker, for the first time or again."""
    PREFILLING = "prefilling"
    """A worker was told to proceed; it is the current attempt."""
    REPLACING = "replacing"
    """A second worker has the task while the first may still write into the room: a fresh room is on its way."""
    RENEWING = "renewing"
    """A worker failed after its KV was announced; the task is queued again, and a fresh room is on its way."""
    CLAIMING = "claiming"
    IMPORTING = "importing"
    DECODING = "decoding"
    """The stream runs on imported KV."""
    GIVING_UP = "giving up"
    """Left at once, see its two rows."""
    LOCAL = "local"
    """The stream runs, prefilled here."""
    ENDED = "ended"


class E(StrEnum):
    """What can happen."""

    START = "start"
    RESERVED = "reserved"
    RESERVE_FAILED = "reserve failed"
    SUBMITTED = "submitted"
    SUBMIT_FAILED = "submit failed"
    TAKEN = "taken"
    READY = "ready"
    TICKET_REFUSED = "ticket refused"
    """KvReady came with a ticket that the gate does not admit."""
    FAILED = "failed"
    CLAIMED = "claimed"
    CLAIM_FAILED = "claim failed"
    IMPORTED = "imported"
    IMPORT_FAILED = "import failed"
    STREAM_ENDED = "stream ended"
    TIMEOUT = "timeout"
    """The deadline that was armed last has passed."""
    ABORT = "abort"
    NEXT = "next"
    """Follows at once in a state that is left at once."""


class A(StrEnum):
    """What to do about it. An action concerns the event's attempt, if it has one, else the current one; those named
    `current` always concern that.
    """

    RESERVE = "reserve"
    SUBMIT = "submit"
    CANCEL_TASK = "cancel task"
    ADOPT = "adopt attempt"
    """The event's attempt becomes the current one."""
    FORGET = "forget attempt"
    GRANT = "grant"
    """Answer TaskTaken with Proceed and, unless pull, expose the room to its writer."""
    REFUSE = "refuse"
    """Answer TaskTaken with Gone."""
    REFUSE_CURRENT = "refuse current"
    LET_GO = "let go"
    """Settle the event's attempt as released; its answer says that it writes no more."""
    LET_GO_CURRENT = "let go of current"
    SETTLE = "settle as imported"
    CONCEAL = "conceal room"
    """The event's attempt, if it is one, has said that it writes no more."""
    DROP_ROOM = "drop room"
    """Released when nobody can write to it any more."""
    DROP_LATE_ROOM = "drop late room"
    CLAIM = "claim"
    IMPORT = "import"
    CANCEL_IMPORT = "cancel import"
    DECODE = "decode"
    DECODE_LOCALLY = "decode locally"
    ABORT_DECODE = "abort decode"
    FREE_ROOM = "free room"
    """What decode took over, should it have left anything."""
    EMIT_FIRST = "emit first token"
    """The sequence ended with it."""
    FINISH_ABORTED = "finish aborted"
    FAIL = "fail"
    """One error to the client."""
    ARM_RESERVE = "arm reserve deadline"
    ARM_QUEUE = "arm queue deadline"
    ARM_PREFILL = "arm prefill deadline"
    ARM_TRANSFER = "arm transfer deadline"
    ARM_MEETING = "arm meeting deadline"
    """Prefill and transfer together."""
    DISARM = "disarm"


class DecodeFacts(msgspec.Struct):
    """What guards look at. The last four describe the event."""

    fallback: bool = True
    """Prefilling here is allowed when it cannot be had elsewhere."""
    poison_falls_back: bool = False
    current: str = ""
    """The attempt that was told, or will be told, to proceed."""
    rendezvous: Rendezvous | None = None
    """Of the current attempt."""
    newest: int = 0
    """The latest delivery that was adopted."""
    spent: bool = False
    """A later delivery was refused, and the task has left the queue with it."""
    attempt: str = ""
    delivery: int = 0
    """With `taken`."""
    failure: FailureKind | None = None
    rejected: bool = False
    """The engine says that the request is at fault."""
    ended: bool = False
    """The sequence ended with its first token."""


GUARDS: dict[str, Callable[[DecodeFacts], bool]] = {
    "another attempt": lambda f: f.attempt != f.current,
    "an earlier delivery": lambda f: f.attempt != f.current and f.delivery <= f.newest,
    "pull": lambda f: f.rendezvous is Rendezvous.PULL,
    "push": lambda f: f.rendezvous is Rendezvous.PUSH,
    "another, pull": lambda f: f.attempt != f.current and f.rendezvous is Rendezvous.PULL,
    "later, handshake": lambda f: f.delivery > f.newest and f.rendezvous is Rendezvous.HANDSHAKE,
    "another, not pull": lambda f: f.attempt != f.current and f.rendezvous is not Rendezvous.PULL,
    "another failed": lambda f: f.attempt not in ("", f.current),
    "pull, by the queue": lambda f: not f.attempt and f.rendezvous is Rendezvous.PULL,
    "ended by its first token": lambda f: f.ended,
    "rejected": lambda f: f.rejected or f.failure is FailureKind.REJECTED,
    "poisoned": lambda f: f.failure is FailureKind.POISONED and not f.poison_falls_back,
    "dead letter": lambda f: f.failure in (FailureKind.POISONED, FailureKind.ABANDONED),
    "to be tried again": lambda f: f.failure is FailureKind.RETRYABLE and not f.spent,
    "fallback": lambda f: f.fallback,
}

HANDED = (S.CLAIMING, S.IMPORTING, S.DECODING)
OVER = (S.LOCAL, S.ENDED)


def _row(states: S | tuple[S, ...], event: E, when: str, to: S | None, *do: A, why: str = "") -> Row[S, E, A]:
    return Row((states,) if isinstance(states, S) else states, event, when, to, do, why)


def _never(event: E, *states: S, why: str = "late, or said twice") -> Row[S, E, A]:
    return Row(states, event, "", None, (), why)


TABLE: Table[S, E, A, DecodeFacts] = Table(
    [
        _row(S.IDLE, E.START, "", S.RESERVING, A.RESERVE, A.ARM_RESERVE),
        _row(
            S.RESERVING, E.RESERVED, "", S.QUEUED, A.SUBMIT, A.ARM_QUEUE, why="room first: a full worker queues nothing"
        ),
        _row(S.RESERVING, E.RESERVE_FAILED, "rejected", S.ENDED, A.DISARM, A.FAIL),
        _row(S.RESERVING, E.RESERVE_FAILED, "", S.GIVING_UP, why="decode waits for room by itself"),
        _row(S.RESERVING, E.TIMEOUT, "", S.GIVING_UP),
        _row(S.QUEUED, E.SUBMITTED, "", None),
        _row(S.QUEUED, E.SUBMIT_FAILED, "", S.GIVING_UP, A.DROP_ROOM, why="queue full, or not to be reached"),
        _row(
            (S.QUEUED, S.PREFILLING, S.REPLACING, S.RENEWING),
            E.TAKEN,
            "an earlier delivery",
            None,
            A.REFUSE,
            why="late: it has been delivered to another since",
        ),
        _row(S.QUEUED, E.TAKEN, "", S.PREFILLING, A.ADOPT, A.GRANT, A.ARM_PREFILL),
        _row(S.QUEUED, E.TIMEOUT, "", S.GIVING_UP, A.CANCEL_TASK, A.DROP_ROOM, why="no worker had room in time"),
        _row(S.QUEUED, E.ABORT, "", S.ENDED, A.DISARM, A.CANCEL_TASK, A.DROP_ROOM, A.FINISH_ABORTED),
        # The prefill.
        _row(
            S.PREFILLING,
            E.TAKEN,
            "another, pull",
            None,
            A.LET_GO_CURRENT,
            A.ADOPT,
            A.GRANT,
            A.ARM_PREFILL,
            why="delivered again: the first worker is slow or dead",
        ),
        _row(
            S.PREFILLING,
            E.TAKEN,
            "another, not pull",
            S.REPLACING,
            A.LET_GO_CURRENT,
            A.DROP_ROOM,
            A.ADOPT,
            A.RESERVE,
            A.ARM_RESERVE,
            why="two writers never share a room",
        ),
        _row(S.PREFILLING, E.TAKEN, "", None, A.GRANT, why="asked twice"),
        _row(S.PREFILLING, E.READY, "another attempt", None, A.LET_GO),
        _row(
            S.PREFILLING,
            E.READY,
            "ended by its first token",
            S.ENDED,
            A.DISARM,
            A.CONCEAL,
            A.LET_GO,
            A.DROP_ROOM,
            A.EMIT_FIRST,
            why="no KV is needed",
        ),
        _row(S.PREFILLING, E.READY, "pull", S.CLAIMING, A.ARM_TRANSFER, A.CLAIM),
        _row(
            S.PREFILLING, E.READY, "push", S.IMPORTING, A.ARM_TRANSFER, A.CONCEAL, A.IMPORT, why="it has been written"
        ),
        _row(S.PREFILLING, E.READY, "", S.IMPORTING, A.ARM_MEETING, A.IMPORT, why="handshake: both legs run"),
        _row(S.PREFILLING, E.TICKET_REFUSED, "another attempt", None, A.LET_GO),
        _row(S.PREFILLING, E.TICKET_REFUSED, "", S.GIVING_UP, A.LET_GO, A.CANCEL_TASK, A.DROP_ROOM),
        _row(S.PREFILLING, E.TIMEOUT, "", S.GIVING_UP, A.LET_GO_CURRENT, A.CANCEL_TASK, A.DROP_ROOM),
        _row(
            S.PREFILLING, E.ABORT, "", S.ENDED, A.DISARM, A.LET_GO_CURRENT, A.CANCEL_TASK, A.DROP_ROOM, A.FINISH_ABORTED
        ),
        _row((S.QUEUED, S.PREFILLING), E.FAILED, "another failed", None, A.CONCEAL),
        _row((S.QUEUED, S.PREFILLING), E.FAILED, "rejected", S.ENDED, A.DISARM, A.CONCEAL, A.DROP_ROOM, A.FAIL),
        _row(
            (S.QUEUED, S.PREFILLING),
            E.FAILED,
            "poisoned",
            S.ENDED,
            A.DISARM,
            A.CONCEAL,
            A.DROP_ROOM,
            A.FAIL,
            why="it would fail here as well",
        ),
        _row((S.QUEUED, S.PREFILLING), E.FAILED, "dead letter", S.GIVING_UP, A.CONCEAL, A.DROP_ROOM),
        _row(
            (S.QUEUED, S.PREFILLING),
            E.FAILED,
            "",
            S.QUEUED,
            A.CONCEAL,
            A.FORGET,
            A.ARM_QUEUE,
            why="the task is queued again",
        ),
        # A fresh room for the second writer.
        _row(S.REPLACING, E.RESERVED, "", S.PREFILLING, A.GRANT, A.ARM_PREFILL),
        _row(S.REPLACING, E.RESERVE_FAILED, "", S.GIVING_UP, A.REFUSE_CURRENT),
        _row(S.REPLACING, E.TIMEOUT, "", S.GIVING_UP, A.REFUSE_CURRENT, A.CANCEL_TASK),
        _row(S.REPLACING, E.ABORT, "", S.ENDED, A.DISARM, A.REFUSE_CURRENT, A.CANCEL_TASK, A.FINISH_ABORTED),
        _row(S.REPLACING, E.TAKEN, "another attempt", None, A.REFUSE_CURRENT, A.ADOPT),
        _row(S.REPLACING, E.TAKEN, "", None, why="asked twice; answered once the room is there"),
        _row(S.REPLACING, E.FAILED, "dead letter", S.GIVING_UP, A.REFUSE_CURRENT),
        _row(S.REPLACING, E.FAILED, "", None, A.CONCEAL, why="the next TaskTaken or the deadline goes on"),
        # The transfer.
        _row(S.CLAIMING, E.CLAIMED, "", S.IMPORTING, A.IMPORT),
        _row(
            S.CLAIMING,
            E.CLAIM_FAILED,
            "",
            S.GIVING_UP,
            A.LET_GO_CURRENT,
            A.DROP_ROOM,
            why="the lease is over, or nearly",
        ),
        _row(S.CLAIMING, E.FAILED, "another attempt", None, A.CONCEAL),
        _row(S.CLAIMING, E.FAILED, "to be tried again", S.QUEUED, A.FORGET, A.ARM_QUEUE, why="the holder is leaving"),
        _row(S.CLAIMING, E.FAILED, "", S.GIVING_UP, A.DROP_ROOM),
        _row(S.CLAIMING, E.TIMEOUT, "", S.GIVING_UP, A.LET_GO_CURRENT, A.DROP_ROOM),
        _row(S.CLAIMING, E.ABORT, "", S.ENDED, A.DISARM, A.LET_GO_CURRENT, A.DROP_ROOM, A.FINISH_ABORTED),
        _row(S.IMPORTING, E.IMPORTED, "", S.DECODING, A.DISARM, A.SETTLE, A.DECODE),
        _row(S.IMPORTING, E.IMPORT_FAILED, "", S.GIVING_UP, A.LET_GO_CURRENT, A.DROP_ROOM),
        _row(
            S.IMPORTING,
            E.TAKEN,
            "later, handshake",
            S.REPLACING,
            A.CANCEL_IMPORT,
            A.LET_GO_CURRENT,
            A.DROP_ROOM,
            A.ADOPT,
            A.RESERVE,
            A.ARM_RESERVE,
            why="the one that was to be met is dead",
        ),
        _row(S.IMPORTING, E.FAILED, "another failed", None, A.CONCEAL),
        _row(S.IMPORTING, E.FAILED, "pull, by the queue", None, why="the holder may live and be read all the same"),
        _row(S.IMPORTING, E.FAILED, "push", None, why="the KV is here already"),
        _row(
            S.IMPORTING,
            E.FAILED,
            "to be tried again",
            S.RENEWING,
            A.CANCEL_IMPORT,
            A.CONCEAL,
            A.DROP_ROOM,
            A.FORGET,
            A.RESERVE,
            A.ARM_RESERVE,
            why="one leg failed: so does the other, at once",
        ),
        _row(S.IMPORTING, E.FAILED, "rejected", S.ENDED, A.DISARM, A.CANCEL_IMPORT, A.CONCEAL, A.DROP_ROOM, A.FAIL),
        _row(S.IMPORTING, E.FAILED, "poisoned", S.ENDED, A.DISARM, A.CANCEL_IMPORT, A.CONCEAL, A.DROP_ROOM, A.FAIL),
        _row(S.IMPORTING, E.FAILED, "", S.GIVING_UP, A.CANCEL_IMPORT, A.CONCEAL, A.DROP_ROOM),
        _row(S.RENEWING, E.RESERVED, "", S.QUEUED, A.ARM_QUEUE),
        _row(S.RENEWING, E.TAKEN, "", S.REPLACING, A.ADOPT, why="answered once the room is there"),
        _row(S.RENEWING, E.RESERVE_FAILED, "", S.GIVING_UP, A.CANCEL_TASK),
        _row(S.RENEWING, E.TIMEOUT, "", S.GIVING_UP, A.CANCEL_TASK),
        _row(S.RENEWING, E.ABORT, "", S.ENDED, A.DISARM, A.CANCEL_TASK, A.FINISH_ABORTED),
        _row(S.RENEWING, E.FAILED, "dead letter", S.GIVING_UP),
        _row(S.RENEWING, E.FAILED, "", None, A.CONCEAL, why="the next TaskTaken or the deadline goes on"),
        _row(S.IMPORTING, E.TIMEOUT, "", S.GIVING_UP, A.CANCEL_IMPORT, A.LET_GO_CURRENT, A.DROP_ROOM),
        _row(
            S.IMPORTING,
            E.ABORT,
            "",
            S.ENDED,
            A.DISARM,
            A.CANCEL_IMPORT,
            A.LET_GO_CURRENT,
            A.DROP_ROOM,
            A.FINISH_ABORTED,
        ),
        # The streams.
        _row(S.DECODING, E.STREAM_ENDED, "", S.ENDED, A.FREE_ROOM),
        _row(S.LOCAL, E.STREAM_ENDED, "", S.ENDED),
        _row((S.DECODING, S.LOCAL), E.ABORT, "", None, A.ABORT_DECODE, why="the stream ends with abort"),
        _row(S.GIVING_UP, E.NEXT, "fallback", S.LOCAL, A.DISARM, A.DECODE_LOCALLY),
        _row(S.GIVING_UP, E.NEXT, "", S.ENDED, A.DISARM, A.FAIL),
        _row((S.IDLE, S.RESERVING), E.ABORT, "", S.ENDED, A.DISARM, A.FINISH_ABORTED),
        # What comes late.
        _row(
            (*OVER, *HANDED, S.QUEUED, S.PREFILLING),
            E.RESERVED,
            "",
            None,
            A.DROP_LATE_ROOM,
            why="asked for before giving up",
        ),
        _row((*OVER, *HANDED), E.TAKEN, "", None, A.REFUSE),
        _row((S.QUEUED, S.REPLACING, S.RENEWING, *OVER), E.READY, "", None, A.LET_GO),
        _row(HANDED, E.READY, "another attempt", None, A.LET_GO),
        _row((S.QUEUED, S.REPLACING, S.RENEWING, *OVER), E.TICKET_REFUSED, "", None, A.LET_GO),
        _row(HANDED, E.TICKET_REFUSED, "another attempt", None, A.LET_GO),
        _never(E.READY, *HANDED),
        _never(E.TICKET_REFUSED, *HANDED, why="a replay of the ticket in use"),
        _never(E.ABORT, S.ENDED),
        _never(E.TIMEOUT, S.IDLE, S.DECODING, *OVER, why="disarmed in the same breath"),
        _never(E.RESERVE_FAILED, S.QUEUED, S.PREFILLING, *HANDED, *OVER),
        _never(
            E.SUBMITTED, S.PREFILLING, S.REPLACING, S.RENEWING, *HANDED, *OVER, why="taken before the queue confirmed"
        ),
        _never(E.SUBMIT_FAILED, S.PREFILLING, S.REPLACING, S.RENEWING, *HANDED, *OVER, why="it was queued after all"),
        _never(E.CLAIMED, S.IMPORTING, S.DECODING, *OVER),
        _never(E.CLAIM_FAILED, S.IMPORTING, S.DECODING, *OVER),
        _never(E.IMPORTED, *OVER, why="cancelled too late; the room is dropped all the same"),
        _never(E.IMPORT_FAILED, *OVER),
        _row((S.DECODING, *OVER), E.FAILED, "", None, A.CONCEAL, why="not needed any more"),
        _never(E.STREAM_ENDED, S.ENDED),
    ],
    GUARDS,
)

REACHABLE: dict[E, tuple[S, ...]] = {
    E.START: (S.IDLE,),
    E.RESERVED: (S.RESERVING, S.REPLACING, S.RENEWING, S.QUEUED, S.PREFILLING, *HANDED, *OVER),
    E.RESERVE_FAILED: (S.RESERVING, S.REPLACING, S.RENEWING, S.QUEUED, S.PREFILLING, *HANDED, *OVER),
    E.SUBMITTED: (S.QUEUED, S.PREFILLING, S.REPLACING, S.RENEWING, *HANDED, *OVER),
    E.SUBMIT_FAILED: (S.QUEUED, S.PREFILLING, S.REPLACING, S.RENEWING, *HANDED, *OVER),
    E.TAKEN: (S.QUEUED, S.PREFILLING, S.REPLACING, S.RENEWING, *HANDED, *OVER),
    E.READY: (S.QUEUED, S.PREFILLING, S.REPLACING, S.RENEWING, *HANDED, *OVER),
    E.TICKET_REFUSED: (S.QUEUED, S.PREFILLING, S.REPLACING, S.RENEWING, *HANDED, *OVER),
    E.FAILED: (S.QUEUED, S.PREFILLING, S.REPLACING, S.RENEWING, *HANDED, *OVER),
    E.CLAIMED: (*HANDED, *OVER),
    E.CLAIM_FAILED: (*HANDED, *OVER),
    E.IMPORTED: (S.IMPORTING, *OVER),
    E.IMPORT_FAILED: (S.IMPORTING, *OVER),
    E.STREAM_ENDED: (S.DECODING, *OVER),
    E.TIMEOUT: tuple(state for state in S if state is not S.GIVING_UP),
    E.ABORT: tuple(state for state in S if state is not S.GIVING_UP),
    E.NEXT: (S.GIVING_UP,),
}
"""In which states an event can come at all; the rest would be a defect, and raises."""
