"""Which transport moves KV between two endpoints: what both offer and what is fastest between them, with the reason."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from core.kv.transfer.errors import TransferRefused
from core.kv.transfer.host import Whereabouts
from core.kv.transfer.offer import TransferOffer
from core.kv.transfer.pool import MemoryKind


class Transport(StrEnum):
    """How bytes move. In configuration (`kv-transfer`), `auto` leaves the choice to the core."""

    AUTO = "auto"
    MEMORY = "memory"
    """A copy within one process."""
    NIXL = "nixl"
    """One-sided reads and writes: device memory, RDMA, or cross-memory attach on one host."""
    TCP = "tcp"
    """Plain sockets through host memory."""


class Choice(msgspec.Struct, frozen=True):
    """A transport and why it was chosen."""

    transport: Transport
    reason: str


def choose(
    mine: TransferOffer, theirs: TransferOffer, wanted: Transport, *, attach: bool, nixl_note: str = ""
) -> Choice:
    """Pick the transport between this endpoint and a peer's.

    `wanted` is the configuration's word; `attach` whether this process can read the peer's memory (`can_attach`);
    `nixl_note` why this side has no NIXL. Raises `TransferRefused`, naming what each side offers, when nothing fits.
    """
    wanted = Transport(wanted)
    possible = {
        Transport.MEMORY: _memory(mine, theirs),
        Transport.NIXL: _nixl(mine, theirs, nixl_note),
        Transport.TCP: _tcp(mine, theirs),
    }
    if wanted is not Transport.AUTO:
        obstacle = possible[wanted]
        if obstacle:
            raise TransferRefused(
                f"kv-transfer is {wanted}, which cannot move KV between {mine.worker_id} and {theirs.worker_id}: "
                f"{obstacle}. Configure kv-transfer: auto, or what both sides have"
            )
        return Choice(wanted, f"configured (kv-transfer: {wanted})")
    if not possible[Transport.MEMORY]:
        return Choice(Transport.MEMORY, "both sides are in one process")
    if not possible[Transport.NIXL]:
        if MemoryKind.VRAM in (mine.memory, theirs.memory):
            return Choice(Transport.NIXL, "the blocks are in device memory and both sides have NIXL")
        if attach:
            return Choice(Transport.NIXL, "same host, and this process can reach the peer's memory (CMA)")
        if mine.where.rdma and theirs.where.rdma:
            return Choice(Transport.NIXL, "both hosts have RDMA and both sides have NIXL")
    if not possible[Transport.TCP]:
        if possible[Transport.NIXL]:
            why = possible[Transport.NIXL]
        else:
            why = f"no CMA ({_apart(mine.where, theirs.where)}) and no RDMA, and NIXL over TCP is slower than a socket"
        return Choice(Transport.TCP, why)
    if not possible[Transport.NIXL]:
        return Choice(Transport.NIXL, f"nothing faster: {possible[Transport.TCP]}")
    raise TransferRefused(
        f"KV cannot move between {mine.worker_id} and {theirs.worker_id}: "
        + "; ".join(f"{transport}: {obstacle}" for transport, obstacle in possible.items())
    )


def _memory(mine: TransferOffer, theirs: TransferOffer) -> str:
    if mine.where.process != theirs.where.process:
        return "they are different processes"
    return _host_access(mine, theirs)


def _nixl(mine: TransferOffer, theirs: TransferOffer, note: str) -> str:
    if mine.nixl is None:
        return note or f"{mine.worker_id} has no NIXL"
    if theirs.nixl is None:
        return f"{theirs.worker_id} has no NIXL"
    return ""


def _tcp(mine: TransferOffer, theirs: TransferOffer) -> str:
    return _host_access(mine, theirs)


def _host_access(mine: TransferOffer, theirs: TransferOffer) -> str:
    for offer in (mine, theirs):
        if not offer.through_host:
            return f"the KV of {offer.worker_id} is in device memory and its engine gave no copier"
    return ""


def _apart(mine: Whereabouts, theirs: Whereabouts) -> str:
    return "same host, but ptrace or namespaces forbid it" if mine.boot == theirs.boot else "different hosts"
