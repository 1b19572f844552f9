"""What decode and prefill workers say to each other about one task.

A `PrefillTask` waits in the queue. The worker that takes it opens an *attempt* and asks the decode worker (`TaskTaken`)
whether the answer is still wanted; `Proceed` hands it the room, `Gone` sends it home. `KvReady` brings the ticket,
`AttemptFailed` the bad news. The decode worker claims the KV right before it reads it (`ClaimKv`), and settles the
attempt in the end (`SettleAttempt`), whatever happened. Every message may come late, twice, or never: attempts are
named, so that a message of an earlier one is recognized, and leases end what nobody settles.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from core.kv.session import Outcome
from core.messages.engine import Rendezvous
from core.messages.kv import KvReservation, KvTicket
from core.messages.output import Delta
from core.messages.request import EngineRequest

TASK_SCHEMA = 1

TOP_PRIORITY = 2
"""Queues tell apart this many levels above and below 0; what lies beyond counts as the last level."""


class PrefillTask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A prompt to be prefilled elsewhere."""

    schema: int = TASK_SCHEMA
    task_id: str
    """Unique in the deployment, also among requests that were tried before: one remote prefill of one request."""
    request: EngineRequest
    decode_worker: str
    """Who asks: the audience of the ticket."""
    reply_to: str
    """Address on the wire where the decode worker answers."""
    rendezvous: tuple[Rendezvous, ...]
    """What the decode side can do, best first."""
    fingerprint: dict[str, str] = {}
    """`EngineInfo.kv_fingerprint` of the decode worker."""
    block_hashes: tuple[int, ...] = ()
    """The core's chained hashes of the prompt's full blocks, for workers that look for prefixes that they hold."""

    @property
    def level(self) -> int:
        """The request's priority as the queue sees it, from -TOP_PRIORITY to TOP_PRIORITY; larger goes first."""
        return max(-TOP_PRIORITY, min(TOP_PRIORITY, self.request.priority))

    @property
    def tokens(self) -> int:
        """Length of the prompt: what the task asks of a worker's room."""
        return len(self.request.token_ids)


class FailureKind(StrEnum):
    """What an attempt's failure says about the next."""

    REJECTED = "rejected"
    """The request is at fault; nobody can serve it."""
    RETRYABLE = "retryable"
    """Another worker, or the same one later, may succeed; the task is queued again."""
    POISONED = "poisoned"
    """It failed on as many workers as were allowed to try, each time with an error; the task is a dead letter now."""
    ABANDONED = "abandoned"
    """As many workers as were allowed to try vanished with it; the task is a dead letter now."""


class TaskTaken(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A prefill worker has the task. Answered with `Proceed` or `Gone`."""

    task_id: str
    attempt: str
    """Unique for ever: names this worker's try at this task."""
    delivery: int
    """See `Taken.delivery`."""
    worker_id: str
    incarnation: str
    reply_to: str
    """Where the prefill worker answers `ClaimKv` and `SettleAttempt`."""
    rendezvous: Rendezvous
    """The kind that it chose of those offered."""


class KvReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The KV can be had: read with `pull`, has been written with `push`; with `handshake`, where to meet.

    Answered with `Noted`, or with `Gone` when it is not wanted any more.
    """

    task_id: str
    attempt: str
    ticket: KvTicket | None
    """None when there is nothing to import because the sequence ended with its first token."""
    first: Delta | None
    """The first token; None with `handshake`, where it is not known yet."""


class AttemptFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The attempt is over; nothing of it is held or written any more. Answered with `Noted`.

    `attempt` is empty when the task ended in the queue, with no worker's try to blame.
    """

    task_id: str
    attempt: str
    kind: FailureKind
    message: str
    """A sentence for the user."""
    param: str | None = None
    code: str | None = None
    """With `rejected`: as in `RequestRejected`."""


class ClaimKv(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The decode worker is about to read. Answered with `Claimed`, or with `ClaimRefused`."""

    task_id: str
    attempt: str
    session: str
    nonce: str


class SettleAttempt(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The decode worker needs the attempt no more: it has the KV, or let go. Answered with `Noted`."""

    task_id: str
    attempt: str
    outcome: Outcome


class Proceed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Go on. `seconds`: how long the decode worker will wait for the KV, from the moment that it was asked."""

    reservation: KvReservation | None
    """The room, with `push` and `handshake`."""
    seconds: float


class Gone(msgspec.Struct, frozen=True, tag=True):
    """Nobody wants the answer: drop the task."""

    why: str


class Claimed(msgspec.Struct, frozen=True, tag=True):
    """The KV may be read for so many seconds from when the question was sent."""

    seconds: float


class ClaimRefused(msgspec.Struct, frozen=True, tag=True):
    """The KV must not be read."""

    why: str


class Noted(msgspec.Struct, frozen=True, tag=True):
    """Received."""


Question = TaskTaken | KvReady | AttemptFailed | ClaimKv | SettleAttempt
"""What is sent to a worker's address; every one has an answer, so that the sender knows that it arrived."""
Answer = Proceed | Gone | Claimed | ClaimRefused | Noted
