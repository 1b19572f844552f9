"""This side of every transfer: the pool, who may touch it, and how its bytes stream in and out through the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import xxhash

from core.kv.transfer.errors import ChecksumMismatch
from core.kv.transfer.execute import copy_blocks
from core.kv.transfer.grants import Access, Grants
from core.kv.transfer.inflight import Hold, InFlight
from core.kv.transfer.pool import KvPool, MemoryKind, Pattern
from core.kv.transfer.wire import WINDOW

_SEND_BYTES, _RECEIVE_BYTES = 8 << 20, 256 << 10
"""Host memory handed to the network at a time. Sending waits within one call; receiving looks at the clock between."""
_STAGE_BYTES = 32 << 20
"""Host memory through which blocks in device memory pass at a time."""


class LocalSide:
    """A pool with its grants and its transfers in flight. Everything here may be called from any thread."""

    def __init__(self, pool: KvPool, grants: Grants, inflight: InFlight) -> None:
        self.pool = pool
        self.grants = grants
        self.inflight = inflight

    def admit(self, session: str, blocks: Sequence[int], access: Access) -> tuple[Hold, float]:
        """Claim a session's blocks for a peer; the claim and the seconds left of the grant.

        Raises `TransferRefused` or `TransferLate`. The grant is checked again under the claim, so that a session that
        is released meanwhile either refuses or has its blocks freed only after the claim.
        """
        self.grants.require(session, blocks, access)
        hold = self.inflight.hold(blocks)
        try:
            return hold, self.grants.require(session, blocks, access)
        except BaseException:
            hold.release()
            raise

    def outgoing(self, blocks: Sequence[int], pattern: Pattern) -> Iterator[list[memoryview]]:
        """The bytes of the blocks as lists of buffers, to be sent in order; each valid until the next is asked for."""
        for chunk, stage, places in self._chunks(blocks, pattern, _SEND_BYTES):
            if stage is not self.pool:
                copy_blocks(self.pool, stage, chunk, places, pattern)
            yield stage.slices(places, pattern)

    def incoming(self, blocks: Sequence[int], pattern: Pattern) -> Iterator[list[memoryview]]:
        """Buffers to be filled in order; asking for the next, or for the end, says that the last are full."""
        for chunk, stage, places in self._chunks(blocks, pattern, _RECEIVE_BYTES):
            yield stage.slices(places, pattern)
            if stage is not self.pool:
                copy_blocks(stage, self.pool, places, chunk, pattern)

    def checksums(self, blocks: Sequence[int]) -> list[int]:
        """XXH3 (64 bits) of each whole block, region after region."""
        return [_digest(pieces) for pieces in self._whole_blocks(blocks)]

    def _whole_blocks(self, blocks: Sequence[int]) -> Iterator[list[memoryview]]:
        pattern = self.pool.whole
        for chunk, stage, places in self._chunks(blocks, pattern, _SEND_BYTES):
            if stage is not self.pool:
                copy_blocks(self.pool, stage, chunk, places, pattern)
            for place in places:
                yield stage.slices([place], pattern)

    def _chunks(
        self, blocks: Sequence[int], pattern: Pattern, at_once: int
    ) -> Iterator[tuple[Sequence[int], KvPool, Sequence[int]]]:
        """Cut a list of blocks: each piece with the host pool to use for it and the blocks' places there."""
        if self.pool.memory is MemoryKind.DRAM:
            size = sum(length for _, _, length in pattern)
            step = max(1, min(WINDOW // len(pattern), at_once // size))
            for start in range(0, len(blocks), step):
                chunk = blocks[start : start + step]
                yield chunk, self.pool, chunk
        elif blocks:
            step = max(1, min(len(blocks), _STAGE_BYTES // self.pool.layout.block_bytes))
            stage = KvPool.allocate(self.pool.layout, step)
            for start in range(0, len(blocks), step):
                chunk = blocks[start : start + step]
                yield chunk, stage, range(len(chunk))


def verify_blocks(pool: KvPool, blocks: Sequence[int], expected: Sequence[int]) -> None:
    """Raise `ChecksumMismatch` unless whole blocks of a host pool have these checksums."""
    require_checksums([_digest(pool.slices([block], pool.whole)) for block in blocks], expected)


def require_checksums(found: Sequence[int], expected: Sequence[int]) -> None:
    """Raise `ChecksumMismatch` unless blocks arrived as they were exported."""
    wrong = [number for number, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]
    if wrong:
        first = wrong[0]
        raise ChecksumMismatch(
            f"{len(wrong)} of {len(found)} KV blocks arrived with other content than was exported (block {first} of "
            f"the list has checksum {found[first]:#x}, {expected[first]:#x} was exported): the holder reused them, or "
            "memory is faulty. The prompt must be prefilled again"
        )


def _digest(pieces: Sequence[memoryview]) -> int:
    if len(pieces) == 1:
        return xxhash.xxh3_64_intdigest(pieces[0])
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()
