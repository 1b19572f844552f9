"""Canonical KV: block descriptors that any engine can read, and the three things done with them.

A ticket with `canonical: true` carries a `CanonicalKv`: for each tensor-parallel rank of the holder, its endpoint's
offer and the blocks of the sequence there. The importing side takes from each rank the heads that it needs, and only
the tokens that it lacks; block size, order of dimensions and tensor parallelism are converted on the way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

import msgspec

from core.kv.layout import shards_for
from core.kv.lease import Deadline
from core.kv.transfer.endpoint import KvEndpoint
from core.kv.transfer.errors import TransferRefused
from core.kv.transfer.grants import Access, Proof
from core.kv.transfer.offer import decode_offer
from core.kv.transfer.settings import TransferReport


class KvShard(msgspec.Struct, frozen=True, omit_defaults=True):
    """One rank's part of a sequence's KV."""

    offer: bytes
    """Of the rank's endpoint."""
    blocks: tuple[int, ...]
    """In token order."""
    checksums: tuple[int, ...] = ()
    """One for each block, with `kv-checksum`."""
    proof: Proof | None = None
    """Where a reader on the same host sees for itself that the session is still held."""


class CanonicalKv(msgspec.Struct, frozen=True, omit_defaults=True):
    """A sequence's KV, or room for it, on all ranks of a worker. Plain msgpack-able data: the payload of a ticket."""

    session: str
    num_tokens: int
    """Of the sequence, those before `first_token` included."""
    shards: tuple[KvShard, ...]
    first_token: int = 0
    """With which every shard's blocks begin: what comes before is not in them."""


async def export_blocks(
    endpoint: KvEndpoint, session: str, blocks: Sequence[int], access: Access, lease: float
) -> KvShard:
    """Grant a session's blocks for `lease` seconds and describe them, with checksums where they are read and wanted.

    The checksums are of the content now: a reader that comes after the blocks were reused finds out.
    """
    checksums: Sequence[int] = ()
    if access is Access.READ and endpoint.settings.checksum:
        checksums = await endpoint.checksums(blocks)
    endpoint.grant(session, blocks, access, lease)
    return KvShard(endpoint.offer, tuple(blocks), tuple(checksums), endpoint.grants.proof(session))


async def import_blocks(
    endpoint: KvEndpoint,
    kv: CanonicalKv,
    blocks: Sequence[int],
    *,
    cached_tokens: int = 0,
    deadline: Deadline,
) -> list[TransferReport]:
    """Fetch what this rank lacks of a sequence into `blocks`, which hold its first `cached_tokens` tokens already.

    Nothing is moved when everything is cached. Raises `TransferError`: the blocks behind the cached tokens are then
    not to be used, and go back through `free_when_idle`.
    """
    tokens = kv.num_tokens - cached_tokens
    if tokens <= 0:
        return []
    if cached_tokens < kv.first_token:
        raise TransferRefused(
            f"KV session {kv.session!r} begins with token {kv.first_token}, and only {cached_tokens} tokens are here"
        )
    offers = [decode_offer(shard.offer)[0] for shard in kv.shards]
    try:
        chosen = shards_for(endpoint.pool.layout, [offer.layout for offer in offers])
    except ValueError as error:
        raise TransferRefused(f"KV session {kv.session!r} cannot be imported: {error}") from error
    return await _together(
        endpoint.read(
            kv.shards[index].offer,
            kv.session,
            kv.shards[index].blocks,
            blocks,
            deadline=deadline,
            tokens=tokens,
            remote_skip=cached_tokens - kv.first_token,
            local_skip=cached_tokens,
            heads=heads,
            checksums=kv.shards[index].checksums,
            proof=kv.shards[index].proof,
        )
        for index, heads in chosen
    )


async def push_blocks(
    endpoint: KvEndpoint,
    target: CanonicalKv,
    blocks: Sequence[int],
    *,
    first_token: int,
    tokens: int,
    layers: range | None = None,
    deadline: Deadline,
) -> list[TransferReport]:
    """Send tokens [first_token, first_token + tokens) of a sequence, of which `blocks` hold all, to every rank of the
    target that wants heads of this one.

    Called again and again with what has just been computed, chunk by chunk or layer by layer, so that the transfer
    overlaps the prefill. Raises `TransferError`.
    """
    mine = endpoint.pool.layout
    writes = []
    for shard in target.shards:
        offer, _ = decode_offer(shard.offer)
        heads = range(max(mine.heads.start, offer.layout.heads.start), min(mine.heads.stop, offer.layout.heads.stop))
        # With more ranks than heads several of ours hold the same one: the first of them sends it.
        first_holder = mine.tp_size <= mine.kv_heads or mine.tp_rank % (mine.tp_size // mine.kv_heads) == 0
        if heads and first_holder:
            writes.append(
                endpoint.write(
                    shard.offer,
                    target.session,
                    blocks,
                    shard.blocks,
                    deadline=deadline,
                    tokens=tokens,
                    local_skip=first_token,
                    remote_skip=first_token - target.first_token,
                    heads=heads,
                    layers=layers,
                )
            )
    return await _together(writes)


async def _together(transfers: Iterable[Coroutine[Any, Any, TransferReport]]) -> list[TransferReport]:
    """Run transfers at once; the first failure ends the others, and all have ended when it is raised."""
    started = list(transfers)
    if len(started) == 1:
        return [await started[0]]
    tasks = [asyncio.ensure_future(transfer) for transfer in started]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
