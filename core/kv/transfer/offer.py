"""What an endpoint tells its peers: where its pool lies and over which transports it can be reached."""

from __future__ import annotations

from functools import lru_cache

import msgspec

from core.kv.layout import KvLayout
from core.kv.transfer.errors import TransferRefused
from core.kv.transfer.host import Whereabouts
from core.kv.transfer.pool import KvRegion, MemoryKind, PoolGeometry

OFFER_SCHEMA = 1


class TcpAddress(msgspec.Struct, frozen=True):
    """Where the endpoint listens, for data and for questions about sessions."""

    host: str
    port: int


class NixlAddress(msgspec.Struct, frozen=True):
    """The endpoint's NIXL agent."""

    agent: str
    """Unique to one life of the process."""
    metadata: bytes


class TransferOffer(msgspec.Struct, frozen=True, kw_only=True):
    """One pool (one tensor-parallel rank) of a worker, as others can reach it. Valid for one life of the endpoint."""

    schema: int
    worker_id: str
    incarnation: str
    """Unique to one life of the endpoint."""
    layout: KvLayout
    regions: tuple[KvRegion, ...]
    num_blocks: int
    memory: MemoryKind
    device: int
    through_host: bool
    """Whether the processor can get at the blocks: host memory, or device memory with a copier."""
    where: Whereabouts
    board: int
    """Address, in the endpoint's process, of the board of sessions (`Grants.board`)."""
    tcp: TcpAddress
    nixl: NixlAddress | None = None

    def geometry(self) -> PoolGeometry:
        """The pool's addresses. Raises `ValueError` when the offer contradicts itself."""
        return PoolGeometry(self.layout, self.regions, self.num_blocks, self.memory, self.device)


def encode_offer(offer: TransferOffer) -> bytes:
    """An offer as it travels in tickets and discovery."""
    return msgspec.msgpack.encode(offer)


@lru_cache(maxsize=1024)
def decode_offer(data: bytes) -> tuple[TransferOffer, PoolGeometry]:
    """The offer and its geometry; remembered, as every ticket of a worker carries the same bytes.

    Raises `TransferRefused` for bytes that are no offer, or one of another version.
    """
    try:
        schema = msgspec.msgpack.decode(data, type=_Schema).schema
        if schema != OFFER_SCHEMA:
            raise TransferRefused(
                f"the peer's transfer offer has version {schema}, this worker understands {OFFER_SCHEMA}: run the same "
                "release on both"
            )
        offer = msgspec.msgpack.decode(data, type=TransferOffer)
        return offer, offer.geometry()
    except (msgspec.MsgspecError, ValueError) as error:
        raise TransferRefused(f"the peer's transfer offer cannot be read: {error}") from error


class _Schema(msgspec.Struct):
    schema: int
