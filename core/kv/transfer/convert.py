"""Moves between pools of different layout: through a scratch pool in the peer's layout, or byte range by byte range."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from core.kv.layout import KvLayout
from core.kv.lease import Deadline
from core.kv.transfer.choice import Transport
from core.kv.transfer.execute import convert_blocks
from core.kv.transfer.grants import Access
from core.kv.transfer.move import Move, Movers, Remote, neighbour
from core.kv.transfer.plan import Group, narrow_pattern, runs, token_groups
from core.kv.transfer.pool import KvPool, MemoryKind, Pattern
from core.kv.transfer.scratch import Scratch
from core.kv.transfer.side import LocalSide, require_checksums, verify_blocks
from core.kv.transfer.tcp_client import Cancel

_MIN_PIECE = 4 << 10
"""Pieces shorter than this are not fetched one by one: whole regions are, and sorted out here."""


@dataclass(frozen=True, slots=True)
class Span:
    """Which tokens move: `tokens` of them, from `remote_skip` in the remote list and `local_skip` in the local one."""

    session: str
    remote_blocks: Sequence[int]
    local_blocks: Sequence[int]
    tokens: int
    remote_skip: int
    local_skip: int
    heads: range
    layers: range


@dataclass(frozen=True, slots=True)
class _Part:
    """The tokens of a span that lie in some of its remote blocks."""

    first: int
    """Index in the span's list of remote blocks."""
    count: int
    remote_skip: int
    """Counted from the first token of block `first`."""
    local_skip: int
    tokens: int


class Converter:
    """Converts for one endpoint, one span at a time: memory bandwidth is what limits it."""

    def __init__(self, movers: Movers, own: LocalSide, scratch: Scratch) -> None:
        self._movers = movers
        self._own = own
        self._scratch = scratch
        self._turn = asyncio.Lock()

    async def read(self, remote: Remote, span: Span, deadline: Deadline, checksums: Sequence[int] = ()) -> int:
        """Fetch a span; the bytes that moved. `checksums`, if any, are those of the span's remote blocks."""
        if self._by_ranges(remote):
            return await self._carry_ranges(remote, span, deadline, Access.READ)
        layout = remote.geometry.layout
        if remote.transport is Transport.MEMORY:
            return await self._within(remote, span, deadline, Access.READ, checksums)
        pattern = None if checksums else _worthwhile(layout, span)
        moved = 0
        async with self._turn:
            for part in _parts(span, layout.block_size, self._scratch.capacity(layout)):
                side = await self._scratch.take(layout)
                places = range(part.count)
                blocks = span.remote_blocks[part.first : part.first + part.count]
                await self._movers.read(remote, Move(span.session, blocks, places, side, deadline, pattern))
                expected = checksums[part.first : part.first + part.count]

                def unpack(
                    _: Cancel, part: _Part = part, pool: KvPool = side.pool, expected: Sequence[int] = expected
                ) -> None:
                    if expected:
                        verify_blocks(pool, range(part.count), expected)
                    self._unpack(span, part, pool, range(part.count))

                await self._movers.in_thread(unpack, deadline, self._own.inflight.hold(span.local_blocks))
                moved += part.count * _bytes(layout, pattern)
        return moved

    async def write(self, remote: Remote, span: Span, deadline: Deadline) -> int:
        """Send a span; the bytes that moved."""
        if self._by_ranges(remote):
            return await self._carry_ranges(remote, span, deadline, Access.WRITE)
        layout = remote.geometry.layout
        if remote.transport is Transport.MEMORY:
            return await self._within(remote, span, deadline, Access.WRITE)
        moved = 0
        async with self._turn:
            for part in _parts(span, layout.block_size, self._scratch.capacity(layout)):
                side = await self._scratch.take(layout)

                def pack(_: Cancel, part: _Part = part, pool: KvPool = side.pool) -> None:
                    self._pack(span, part, pool, range(part.count))

                await self._movers.in_thread(pack, deadline, self._own.inflight.hold(span.local_blocks))
                for places, tokens in _covered(part, layout.block_size):
                    pattern = narrow_pattern(layout, heads=span.heads, layers=span.layers, tokens=tokens)
                    blocks = [span.remote_blocks[part.first + place] for place in places]
                    await self._movers.write(remote, Move(span.session, blocks, places, side, deadline, pattern))
                    moved += len(places) * _bytes(layout, pattern)
        return moved

    def _by_ranges(self, remote: Remote) -> bool:
        """Whether NIXL must move every run of bytes by itself, as device memory cannot be sorted out here."""
        return remote.transport is Transport.NIXL and MemoryKind.VRAM in (self._own.pool.memory, remote.geometry.memory)

    async def _carry_ranges(self, remote: Remote, span: Span, deadline: Deadline, access: Access) -> int:
        pool, there = self._own.pool, remote.geometry
        if access is Access.READ:
            groups = _inward(
                span, there.layout, pool.layout, span.remote_blocks, span.remote_skip, span.local_skip, span.tokens
            )
            rows = runs(there, pool, groups, heads=span.heads, layers=span.layers)[:, [1, 0, 2]]
            carry = self._movers.read_rows
        else:
            groups = _outward(
                span, pool.layout, there.layout, span.remote_blocks, span.remote_skip, span.local_skip, span.tokens
            )
            rows = runs(pool, there, groups, heads=span.heads, layers=span.layers)
            carry = self._movers.write_rows
        hold = self._own.inflight.hold(span.local_blocks)
        await carry(remote, span.session, span.remote_blocks, rows, pool, deadline, hold)
        return int(rows[:, 2].sum())

    async def _within(
        self, remote: Remote, span: Span, deadline: Deadline, access: Access, checksums: Sequence[int] = ()
    ) -> int:
        """Convert straight between two pools of this process."""
        whole = _Part(0, len(span.remote_blocks), span.remote_skip, span.local_skip, span.tokens)

        def work() -> None:
            peer = neighbour(remote.offer)
            hold, _ = peer.admit(span.session, span.remote_blocks, access)
            try:
                if checksums:
                    require_checksums(peer.checksums(span.remote_blocks), checksums)
                convert = self._unpack if access is Access.READ else self._pack
                convert(span, whole, peer.pool, span.remote_blocks)
                peer.grants.require(span.session, span.remote_blocks, access)
            finally:
                hold.release()

        await self._movers.in_thread(lambda _: work(), deadline, self._own.inflight.hold(span.local_blocks))
        layout = remote.geometry.layout
        return span.tokens * len(span.heads) * len(span.layers) * layout.parts * layout.vector_bytes

    def _unpack(self, span: Span, part: _Part, source: KvPool, blocks: Sequence[int]) -> None:
        own = self._own.pool
        groups = _inward(span, source.layout, own.layout, blocks, part.remote_skip, part.local_skip, part.tokens)
        convert_blocks(source, own, groups, heads=span.heads, layers=span.layers)

    def _pack(self, span: Span, part: _Part, target: KvPool, blocks: Sequence[int]) -> None:
        own = self._own.pool
        groups = _outward(span, own.layout, target.layout, blocks, part.remote_skip, part.local_skip, part.tokens)
        convert_blocks(own, target, groups, heads=span.heads, layers=span.layers)


def _inward(
    span: Span, source: KvLayout, own: KvLayout, blocks: Sequence[int], remote_skip: int, local_skip: int, tokens: int
) -> list[Group]:
    return token_groups(
        source.block_size,
        own.block_size,
        blocks,
        span.local_blocks,
        tokens=tokens,
        source_skip=remote_skip,
        target_skip=local_skip,
    )


def _outward(
    span: Span, own: KvLayout, target: KvLayout, blocks: Sequence[int], remote_skip: int, local_skip: int, tokens: int
) -> list[Group]:
    return token_groups(
        own.block_size,
        target.block_size,
        span.local_blocks,
        blocks,
        tokens=tokens,
        source_skip=local_skip,
        target_skip=remote_skip,
    )


def _parts(span: Span, block_size: int, capacity: int) -> Iterator[_Part]:
    """Cut a span at remote block boundaries, `capacity` blocks at a time, leaving out blocks without wanted tokens."""
    start, stop = span.remote_skip, span.remote_skip + span.tokens
    for first in range(start // block_size, -(-stop // block_size), capacity):
        count = min(capacity, -(-stop // block_size) - first)
        begin = max(start, first * block_size)
        end = min(stop, (first + count) * block_size)
        yield _Part(first, count, begin - first * block_size, span.local_skip + begin - start, end - begin)


def _covered(part: _Part, block_size: int) -> Iterator[tuple[range, tuple[int, int]]]:
    """The blocks of a part with the tokens [start, stop) written in each, runs of alike blocks together."""
    begin, end = part.remote_skip, part.remote_skip + part.tokens
    pending: tuple[range, tuple[int, int]] | None = None
    for place in range(part.count):
        tokens = (max(begin - place * block_size, 0), min(end - place * block_size, block_size))
        if pending is not None and pending[1] == tokens:
            pending = (range(pending[0].start, place + 1), tokens)
            continue
        if pending is not None:
            yield pending
        pending = (range(place, place + 1), tokens)
    if pending is not None:
        yield pending


def _worthwhile(layout: KvLayout, span: Span) -> Pattern:
    """What to fetch of each block: only the wanted heads where they lie in decent pieces, all heads otherwise."""
    pattern = narrow_pattern(layout, heads=span.heads, layers=span.layers)
    if min(length for _, _, length in pattern) < _MIN_PIECE:
        return narrow_pattern(layout, heads=None, layers=span.layers)
    return pattern


def _bytes(layout: KvLayout, pattern: Pattern | None) -> int:
    return layout.block_bytes if pattern is None else sum(length for _, _, length in pattern)
