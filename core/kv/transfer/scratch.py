"""Host memory in which blocks of another layout are sorted out."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
from functools import cached_property

from core.kv.layout import KvLayout
from core.kv.transfer.grants import Grants
from core.kv.transfer.inflight import InFlight
from core.kv.transfer.nixl_agent import NixlAgent
from core.kv.transfer.pool import KvPool, KvRegion
from core.kv.transfer.side import LocalSide

SCRATCH_BYTES = 32 << 20
"""How much of a conversion passes through at a time."""


class _Memory:
    """One piece of memory, seen as a pool of whichever layout is asked for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.inflight = InFlight(lambda free: free())
        self._mapped = mmap.mmap(-1, size)

    @cached_property
    def anchor(self) -> ctypes.Array[ctypes.c_char]:
        return (ctypes.c_char * self.size).from_buffer(self._mapped)

    def side(self, layout: KvLayout) -> LocalSide:
        base = ctypes.addressof(self.anchor)
        size = layout.region_bytes
        regions = [KvRegion(base + number * size, layout.block_bytes) for number in range(layout.region_count)]
        pool = KvPool(layout, regions, self.size // layout.block_bytes, owner=self)
        return LocalSide(pool, Grants(), self.inflight)


class Scratch:
    """Keeps one piece of memory for reuse, and sets aside those that a transfer given up may still write to."""

    def __init__(self, nixl: NixlAgent | None, size: int = SCRATCH_BYTES) -> None:
        self._nixl = nixl
        self._size = size
        self._memory: _Memory | None = None
        self._aside: list[tuple[_Memory, KvPool]] = []
        self._pool: KvPool | None = None

    def capacity(self, layout: KvLayout) -> int:
        """Blocks of a layout that fit at a time, at least one."""
        return max(1, self._size // layout.block_bytes)

    async def take(self, layout: KvLayout) -> LocalSide:
        """Memory for `capacity(layout)` blocks that nothing else touches, registered with NIXL where there is any."""
        await self._clear()
        memory = self._memory
        if (
            memory is not None
            and self._pool is not None
            and (memory.inflight.blocks or memory.size < layout.block_bytes)
        ):
            self._aside.append((memory, self._pool))
            memory = None
        if memory is None:
            memory = _Memory(max(self._size, layout.block_bytes))
            self._pool = memory.side(layout).pool
            if self._nixl is not None:
                nixl, pool = self._nixl, self._pool
                await asyncio.wrap_future(nixl.call(lambda: nixl.register(pool)))
            self._memory = memory
        return memory.side(layout)

    async def _clear(self) -> None:
        """Give back what was set aside and is no longer touched."""
        for entry in list(self._aside):
            memory, pool = entry
            if not memory.inflight.blocks:
                self._aside.remove(entry)
                await self._unregister(pool)

    async def _unregister(self, pool: KvPool) -> None:
        nixl = self._nixl
        if nixl is not None:
            await asyncio.wrap_future(nixl.call(lambda: nixl.unregister(pool)))
