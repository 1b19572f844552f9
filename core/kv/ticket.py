"""Sealing KV tickets and opening them: a ticket that was not made for this use is refused in a sentence.

Every worker of a deployment has the same secret. The holder binds a ticket to one life of one worker, one decode worker
and one request, and signs all fields with HMAC-SHA256 under a key derived from the secret. The decode side accepts
a ticket once.
"""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict
from typing import NoReturn

import msgspec

from core.kv.lease import Clock, lease_clock
from core.messages.errors import ConfigError, EngineError
from core.messages.kv import KV_TICKET_SCHEMA, KvTicket
from core.messages.output import Delta

SHORTEST_SECRET = 16
_PURPOSE = b"dynamo kv ticket v1"
_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder = msgspec.msgpack.Decoder(KvTicket)


class TicketRefused(EngineError):
    """A ticket that must not be used. Another prefill gives another ticket, so the request can be retried."""

    retryable = True


class Holder(msgspec.Struct, frozen=True):
    """One life of one worker."""

    worker_id: str
    incarnation: str

    @classmethod
    def new(cls, worker_id: str) -> Holder:
        """A life that has just begun."""
        return cls(worker_id, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"{self.worker_id} (life {self.incarnation})"


class TicketKey:
    """The key under which a deployment's tickets are signed."""

    __slots__ = ("_key",)

    def __init__(self, secret: str | bytes | None = None) -> None:
        """`secret`: the deployment's `kv-secret`, at least 16 bytes, the same on every worker. None draws one, which is
        right when all workers are in this process. Raises `ConfigError` for a shorter one.
        """
        raw = secret.encode() if isinstance(secret, str) else secret
        if raw is None:
            raw = secrets.token_bytes(32)
        if len(raw) < SHORTEST_SECRET:
            raise ConfigError(
                f"kv-secret has {len(raw)} bytes; it needs at least {SHORTEST_SECRET}. "
                "Make one with `openssl rand -hex 32` and give it to every worker."
            )
        self._key = hmac.digest(raw, _PURPOSE, "sha256")

    def sign(self, ticket: KvTicket) -> bytes:
        """The MAC over every field of `ticket` but `mac` itself. 32 bytes."""
        return hmac.digest(self._key, _encoder.encode(msgspec.structs.replace(ticket, mac=b"")), "sha256")


def seal(
    ticket: KvTicket,
    key: TicketKey,
    *,
    holder: Holder,
    audience: str,
    request_id: str,
    expires_in: float,
    first: Delta | None,
) -> KvTicket:
    """An engine's ticket, bound to its use and signed. `expires_in`: seconds, at most what the engine itself offers."""
    bound = msgspec.structs.replace(
        ticket,
        worker_id=holder.worker_id,
        incarnation=holder.incarnation,
        audience=audience,
        request_id=request_id,
        expires_in=min(expires_in, ticket.expires_in),
        first=first,
        nonce=secrets.token_hex(8),
        mac=b"",
    )
    return msgspec.structs.replace(bound, mac=key.sign(bound))


def encode_ticket(ticket: KvTicket) -> bytes:
    """The ticket as bytes."""
    return _encoder.encode(ticket)


def decode_ticket(data: bytes) -> KvTicket:
    """Raises `TicketRefused` for bytes that are no ticket, for example because the end is missing."""
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise TicketRefused(
            f"KV ticket of {len(data)} bytes cannot be read ({error}): it was cut short, or made by another version."
        ) from error


class TicketGate:
    """Where a decode worker admits tickets. Remembers those it has seen for as long as they could be used again, or
    a little longer: until those that came before them are forgotten.
    """

    def __init__(self, key: TicketKey, audience: str, *, clock: Clock = lease_clock) -> None:
        """`audience`: this decode worker's id."""
        self._key = key
        self._audience = audience
        self._clock = clock
        self._seen: OrderedDict[str, float] = OrderedDict()

    def admit(self, ticket: KvTicket, *, holder: Holder, request_id: str, age: float = 0.0) -> None:
        """Return if the ticket may be used, once, for this request.

        `holder`: the life of the worker that was given the task. `age`: seconds that the ticket is known to be old.
        Raises `TicketRefused`, saying what is wrong with it.
        """
        name = f"KV ticket for session '{ticket.session}'"
        if ticket.schema != KV_TICKET_SCHEMA:
            _refuse(
                f"{name} has schema {ticket.schema}, this worker reads {KV_TICKET_SCHEMA}: "
                "run the same version on every worker."
            )
        if not hmac.compare_digest(ticket.mac, self._key.sign(ticket)):
            _refuse(
                f"{name} is not signed with this deployment's secret, or was changed on its way: "
                "give every worker the same kv-secret."
            )
        if ticket.audience != self._audience:
            _refuse(f"{name} was made for worker '{ticket.audience}', this is '{self._audience}'.")
        if ticket.request_id != request_id:
            _refuse(f"{name} was made for request '{ticket.request_id}', not for '{request_id}'.")
        found = Holder(ticket.worker_id, ticket.incarnation)
        if found != holder:
            _refuse(f"{name} was made by {found}, but the task is with {holder}: the blocks may be gone.")
        if age >= ticket.expires_in:
            _refuse(
                f"{name} is {age:.3f} s old and was good for {ticket.expires_in:.3f} s: its blocks may be reused. "
                "If transfers are slow here, raise kv-lease."
            )
        self._forget()
        if ticket.nonce in self._seen:
            _refuse(f"{name} has been used before; a ticket is good for one import.")
        self._seen[ticket.nonce] = self._clock() + ticket.expires_in - age

    def _forget(self) -> None:
        now = self._clock()
        while self._seen and next(iter(self._seen.values())) <= now:
            self._seen.popitem(last=False)


def _refuse(why: str) -> NoReturn:
    raise TicketRefused(why)
