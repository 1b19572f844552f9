"""A worker's KV memory as the core sees it: regions of equally spaced blocks, in host or device memory."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cached_property
from typing import Any

import msgspec

from core.kv.layout import KvLayout


class MemoryKind(StrEnum):
    """What an address means."""

    DRAM = "dram"
    """Host memory: any thread of the process can touch it."""
    VRAM = "vram"
    """Device memory: only transports that know devices, and the pool's copier, can touch it."""


class KvRegion(msgspec.Struct, frozen=True):
    """Block `b` lies at `address + b * stride`, `KvLayout.region_bytes` long."""

    address: int
    stride: int


Copier = Callable[[Sequence[tuple[int, int, int]]], None]
"""Copies byte ranges (source address, target address, length) between any memories that the device reaches.

Called in a thread; returns when the bytes have arrived.
"""


Pattern = tuple[tuple[int, int, int], ...]
"""Pieces (region, offset within the block, bytes) to take of every block of a list, in the order of the byte stream."""


class PoolGeometry:
    """The addresses of a pool, here or on a peer."""

    def __init__(
        self, layout: KvLayout, regions: Sequence[KvRegion], num_blocks: int, memory: MemoryKind, device: int
    ) -> None:
        """Raises `ValueError` when the regions cannot hold the layout."""
        if num_blocks < 1:
            raise ValueError(f"a KV pool needs at least one block, not {num_blocks}")
        if len(regions) != layout.region_count:
            raise ValueError(
                f"layout {layout.dims!r} of {layout.layers} layers has {layout.region_count} memory regions, "
                f"but {len(regions)} were given"
            )
        for number, region in enumerate(regions):
            if region.stride < layout.region_bytes and num_blocks > 1:
                raise ValueError(
                    f"region {number}: blocks are {region.stride} bytes apart but {layout.region_bytes} bytes long"
                )
        self.layout = layout
        self.regions = tuple(regions)
        self.num_blocks = num_blocks
        self.memory = memory
        self.device = device

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The address ranges (start, bytes) that the regions cover, merged where they touch."""
        last = self.num_blocks - 1
        ranges = sorted((r.address, r.address + last * r.stride + self.layout.region_bytes) for r in self.regions)
        merged: list[tuple[int, int]] = []
        for start, end in ranges:
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((start, end))
        return tuple((start, end - start) for start, end in merged)

    @cached_property
    def by_region(self) -> Pattern:
        """The pattern of a whole block, one piece a region."""
        size = self.layout.region_bytes
        return tuple((number, 0, size) for number in range(len(self.regions)))

    @cached_property
    def whole(self) -> Pattern:
        """The pattern of a whole block, with regions that touch merged into one piece: the same bytes in order."""
        pieces: list[tuple[int, int, int]] = []
        size = self.layout.region_bytes
        for number, region in enumerate(self.regions):
            if pieces:
                first, offset, length = pieces[-1]
                head = self.regions[first]
                if head.stride == region.stride and head.address + offset + length == region.address:
                    pieces[-1] = (first, offset, length + size)
                    continue
            pieces.append((number, 0, size))
        return tuple(pieces)

    def check_blocks(self, blocks: Sequence[int]) -> None:
        """Raise `ValueError` for block numbers outside the pool or named twice."""
        if blocks and (min(blocks) < 0 or max(blocks) >= self.num_blocks):
            outside = [block for block in blocks if not 0 <= block < self.num_blocks]
            raise ValueError(f"blocks {outside[:8]} lie outside the pool of {self.num_blocks} blocks")
        if len(set(blocks)) != len(blocks):
            raise ValueError("a block is named twice in one transfer")

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise `ValueError` for pieces that leave their block."""
        if pattern in (self.whole, self.by_region):
            return
        size = self.layout.region_bytes
        for region, offset, length in pattern:
            if not 0 <= region < len(self.regions) or offset < 0 or length < 1 or offset + length > size:
                raise ValueError(
                    f"piece (region {region}, offset {offset}, {length} bytes) leaves its block of {size} bytes in "
                    f"{len(self.regions)} regions"
                )


class KvPool(PoolGeometry):
    """Where a worker's own KV blocks lie.

    `owner` keeps the memory mapped: a registered pool must not be unmapped while a peer may still reach for it, so
    everything that exposes a pool holds the pool, and the pool holds its owner.
    """

    def __init__(
        self,
        layout: KvLayout,
        regions: Sequence[KvRegion],
        num_blocks: int,
        *,
        owner: object,
        memory: MemoryKind = MemoryKind.DRAM,
        device: int = 0,
        copier: Copier | None = None,
        enter_thread: Callable[[], None] | None = None,
    ) -> None:
        """Describe memory that `owner` keeps alive.

        `copier` is needed for device memory whenever bytes go through the host (TCP, or within one process), and
        `enter_thread` makes the device current in a thread that transfers (for instance `torch.cuda.set_device`).
        Raises `ValueError` when the regions cannot hold the layout.
        """
        super().__init__(layout, regions, num_blocks, memory, device)
        self.copier = copier
        self.enter_thread = enter_thread
        self._owner = owner

    @classmethod
    def from_buffers(cls, layout: KvLayout, buffers: Sequence[Any], num_blocks: int) -> KvPool:
        """A pool over writable, contiguous host buffers, one a region, each of exactly `num_blocks` blocks."""
        anchors = [(ctypes.c_char * memoryview(buffer).nbytes).from_buffer(buffer) for buffer in buffers]
        for number, anchor in enumerate(anchors):
            if ctypes.sizeof(anchor) != num_blocks * layout.region_bytes:
                raise ValueError(
                    f"buffer {number} has {ctypes.sizeof(anchor)} bytes; {num_blocks} blocks of {layout.region_bytes} "
                    f"bytes need {num_blocks * layout.region_bytes}"
                )
        regions = [KvRegion(ctypes.addressof(anchor), layout.region_bytes) for anchor in anchors]
        return cls(layout, regions, num_blocks, owner=anchors)

    @classmethod
    def allocate(cls, layout: KvLayout, num_blocks: int) -> KvPool:
        """A zeroed host pool of its own, every block in one piece (its regions one after the other)."""
        memory = mmap.mmap(-1, layout.block_bytes * max(num_blocks, 1))
        anchor = (ctypes.c_char * len(memory)).from_buffer(memory)
        base = ctypes.addressof(anchor)
        regions = [
            KvRegion(base + number * layout.region_bytes, layout.block_bytes) for number in range(layout.region_count)
        ]
        return cls(layout, regions, num_blocks, owner=(anchor, memory))

    @cached_property
    def views(self) -> tuple[memoryview, ...]:
        """One writable byte view a region, from its first block to the end of its address span. Host memory only."""
        if self.memory is not MemoryKind.DRAM:
            raise ValueError("device memory has no host views: use the pool's copier")
        views: list[memoryview] = []
        for region in self.regions:
            end = next(start + size for start, size in self.spans if start <= region.address < start + size)
            views.append(memoryview((ctypes.c_char * (end - region.address)).from_address(region.address)).cast("B"))
        return tuple(views)

    def slices(self, blocks: Sequence[int], pattern: Pattern) -> list[memoryview]:
        """Views of a pattern's pieces, block after block. Host memory only."""
        views = self.views
        if len(pattern) == 1:
            region, offset, length = pattern[0]
            view, stride = views[region], self.regions[region].stride
            return [view[(start := block * stride + offset) : start + length] for block in blocks]
        pieces = [(views[region], self.regions[region].stride, offset, length) for region, offset, length in pattern]
        return [
            view[(start := block * stride + offset) : start + length]
            for block in blocks
            for view, stride, offset, length in pieces
        ]

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless no two regions share a byte of any block."""
        size = self.layout.region_bytes
        for index, one in enumerate(self.regions):
            for other in self.regions[index + 1 :]:
                low, high = sorted((one, other), key=lambda region: region.address)
                last = self.num_blocks - 1
                apart = low.address + last * low.stride + size <= high.address
                woven = low.stride == high.stride and low.address + size <= high.address <= (
                    low.address + low.stride - size
                )
                assert apart or woven, f"regions at {low.address:#x} and {high.address:#x} overlap"
