"""KV events and the messages that move KV blocks between workers."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from core.messages.engine import Rendezvous
from core.messages.output import Delta


class Medium(StrEnum):
    """Where a KV block lies."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    EXTERNAL = "external"


class KvStored(msgspec.Struct, frozen=True, tag="stored", omit_defaults=True):
    """Full blocks that can now be reused, in chain order.

    Hashes are opaque and local to the worker: engines disagree in algorithm, width and sign. The core hashes
    `token_ids` itself.
    """

    block_hashes: list[int]
    """The engine's ids of the blocks, one per block."""
    parent_hash: int | None
    """The engine's id of the block before the first one; None at the start of a sequence."""
    token_ids: list[int]
    """`len(block_hashes) * block_size` ids."""
    block_size: int
    medium: Medium = Medium.DEVICE
    lora: str | None = None
    cache_salt: str | None = None


class KvRemoved(msgspec.Struct, frozen=True, tag="removed", omit_defaults=True):
    """Blocks that can no longer be reused. A hash stored several times is removed as many times."""

    block_hashes: list[int]
    medium: Medium = Medium.DEVICE


class KvCleared(msgspec.Struct, frozen=True, tag="cleared"):
    """Nothing cached remains."""


KvEvent = KvStored | KvRemoved | KvCleared


class KvEventBatch(msgspec.Struct, frozen=True, omit_defaults=True):
    """Events of one engine step, in order."""

    sequence: int
    """Counts from 0 for each data-parallel rank and never skips; a consumer that sees a gap asks for a replay."""
    events: list[KvEvent]
    data_parallel_rank: int = 0


KV_TICKET_SCHEMA = 1
"""Version of `KvTicket` that this code makes and accepts."""


class KvTicket(msgspec.Struct, frozen=True, kw_only=True):
    """Permission and directions to import one session's KV. Serializable; useless once `expires_in` has passed.

    The engine fills in what it knows; the core adds the fields from `first` on and signs the whole (core/kv/ticket.py).
    """

    schema: int = KV_TICKET_SCHEMA
    """Version of this struct."""
    engine: str
    engine_version: str
    fingerprint: dict[str, str]
    """As `EngineInfo.kv_fingerprint` of the exporting worker."""
    session: str
    worker_id: str
    rendezvous: Rendezvous
    expires_in: float
    """Seconds from its making, by the holder's clock, for which the holder keeps the blocks. As handed to `import_kv`:
    seconds from that call within which the KV has to be in."""
    num_tokens: int
    """Tokens whose KV the session holds."""
    canonical: bool
    """Whether `payload` is the core's block descriptors, readable by any engine, or the engine's own."""
    payload: Any
    """Plain msgpack-able data."""
    first: Delta | None = None
    """What the prefill side generated; None while it is not known (handshake). See `EngineSpec.decode`."""
    incarnation: str = ""
    """Which life of the worker `worker_id` made it: a restarted worker holds nothing of its earlier life."""
    audience: str = ""
    """The decode worker that may use it."""
    request_id: str = ""
    """The request that it may be used for."""
    nonce: str = ""
    """Different in every ticket: each is accepted once."""
    mac: bytes = b""
    """Keyed hash over all other fields."""


class KvReservation(msgspec.Struct, frozen=True, kw_only=True):
    """Room on a decode worker for one prompt's KV."""

    session: str
    """Names the reserved blocks for `import_kv`, `decode` and `release_kv`; unique within the worker."""
    num_tokens: int
    """Tokens that there is room for."""
    cached_tokens: int
    """Leading tokens whose KV the decode worker has already, and that need not be moved."""
    payload: Any = None
    """With `push` and `handshake`: what the prefill worker needs to find the room. Plain msgpack-able data."""
    expires_in: float | None = None
    """As handed to `prefill` and `export_kv`: seconds from that call within which they may write. Set by the core."""
