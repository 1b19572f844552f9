"""The doors through which a worker's KV comes and goes: one transfer endpoint for each rank that it shows to others.

The engine computes on one device. It can still show its KV as several tensor-parallel ranks (`kv-shards`), each with a
part of the heads; everything here is done on all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence

from core.kv.lease import Deadline
from core.kv.secret import deployment_secret
from core.kv.transfer import (
    Access,
    CanonicalKv,
    ChecksumMismatch,
    KvEndpoint,
    KvPool,
    KvShard,
    TransferSettings,
    Transport,
    export_blocks,
    import_blocks,
    push_blocks,
)
from core.kv.transfer.offer import decode_offer
from core.messages import EngineConfig

Free = Callable[[list[int]], None]


class KvRanks:
    """Owns the endpoints. Use from one event loop."""

    def __init__(self, endpoints: list[KvEndpoint]) -> None:
        """Use `open`. At least one endpoint."""
        self._endpoints = endpoints
        self.worker_id = endpoints[0].worker_id
        self.block_size = endpoints[0].pool.layout.block_size
        self._checksum = endpoints[0].settings.checksum

    @classmethod
    async def open(cls, pools: Sequence[KvPool], config: EngineConfig) -> KvRanks:
        """Makes the pools reachable for peers. Raises `ConfigError` for settings that cannot work here."""
        settings = TransferSettings(
            transport=Transport(config.kv_transfer),
            checksum=config.kv_checksum,
            host=config.kv_host,
            advertise=config.kv_advertise,
        )
        secret = deployment_secret(config.kv_secret)
        endpoints: list[KvEndpoint] = []
        try:
            for pool in pools:
                endpoint = await KvEndpoint.open(pool, worker_id=config.worker_id, secret=secret, settings=settings)
                endpoints.append(endpoint)
        except BaseException:
            await asyncio.gather(*(endpoint.close() for endpoint in endpoints))
            raise
        return cls(endpoints)

    async def close(self) -> None:
        """Takes everything out of everybody's reach. Idempotent."""
        await asyncio.gather(*(endpoint.close() for endpoint in self._endpoints))

    @property
    def sessions(self) -> frozenset[str]:
        """Sessions whose blocks peers may touch now."""
        return frozenset().union(*(endpoint.grants.sessions for endpoint in self._endpoints))

    def revoke(self, session: str) -> None:
        """Peers may touch the session's blocks no more. Idempotent."""
        for endpoint in self._endpoints:
            endpoint.revoke(session)

    async def grant(self, session: str, blocks: Sequence[int], access: Access, seconds: float) -> tuple[KvShard, ...]:
        """Let peers read or write the blocks from now on, and say where they are."""
        shards = [await export_blocks(each, session, blocks, access, seconds) for each in self._endpoints]
        return tuple(shards)

    async def describe(self, blocks: Sequence[int]) -> tuple[KvShard, ...]:
        """What the blocks hold, for whoever has got a copy: granted to nobody."""
        return tuple(
            [
                KvShard(each.offer, tuple(blocks), tuple(await each.checksums(blocks)) if self._checksum else ())
                for each in self._endpoints
            ]
        )

    async def fetch(self, kv: CanonicalKv, blocks: Sequence[int], *, cached_tokens: int, deadline: Deadline) -> None:
        """See `import_blocks`."""
        for endpoint in self._endpoints:
            await import_blocks(endpoint, kv, tuple(blocks), cached_tokens=cached_tokens, deadline=deadline)

    async def push(
        self, target: CanonicalKv, blocks: Sequence[int], *, first_token: int, tokens: int, deadline: Deadline
    ) -> None:
        """See `push_blocks`."""
        for endpoint in self._endpoints:
            await push_blocks(
                endpoint, target, tuple(blocks), first_token=first_token, tokens=tokens, deadline=deadline
            )

    async def verify(self, kv: CanonicalKv, blocks: Sequence[int], *, first_token: int) -> None:
        """Raise `ChecksumMismatch` unless blocks that were pushed here, which begin with `first_token`, are what their
        sender describes. Content of another layout cannot be compared, and passes.
        """
        if len(kv.shards) != 1 or len(self._endpoints) != 1 or not kv.shards[0].checksums:
            return
        shard, endpoint = kv.shards[0], self._endpoints[0]
        sender, _ = decode_offer(shard.offer)
        if not endpoint.pool.layout.same_block(sender.layout):
            return
        expected = shard.checksums[(first_token - kv.first_token) // self.block_size :]
        if list(expected) != list(await endpoint.checksums(blocks)):
            raise ChecksumMismatch(
                f"KV that worker '{sender.worker_id}' pushed is not what it computed: something else wrote there, or "
                "not all of it arrived. The prompt must be prefilled again"
            )

    def reach(self, kv: CanonicalKv) -> None:
        """Raise `TransferRefused` unless there is a way to whoever offers the blocks."""
        for shard in kv.shards:
            self._endpoints[0].route(shard.offer)

    @contextlib.contextmanager
    def claimed(self, blocks: Sequence[int]) -> Iterator[None]:
        """`free_when_idle` does not free the blocks before the end of this."""
        claim = self._endpoints[0].inflight.hold(tuple(blocks))
        try:
            yield
        finally:
            claim.release()

    def touches(self, blocks: Sequence[int]) -> bool:
        """Whether a transfer may still touch any of the blocks."""
        return any(not endpoint.inflight.blocks.isdisjoint(blocks) for endpoint in self._endpoints)

    def free_when_idle(self, blocks: list[int], free: Free) -> None:
        """Give blocks back as soon as no transfer can touch them on any rank, most often at once."""
        for endpoint in self._endpoints:
            free = _after(endpoint, free)
        free(blocks)

    def check_integrity(self) -> None:
        """See `KvEndpoint.check_integrity`."""
        for endpoint in self._endpoints:
            endpoint.check_integrity()


def _after(endpoint: KvEndpoint, free: Free) -> Free:
    return lambda blocks: endpoint.free_when_idle(blocks, free)
