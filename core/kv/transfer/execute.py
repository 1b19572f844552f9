"""Carry out copies between memory of this process: whole blocks, or a conversion between layouts."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from core.kv.transfer.plan import Group, block_runs, runs, strided_copies
from core.kv.transfer.pool import KvPool, KvRegion, MemoryKind, Pattern

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOOP_BYTES = 16 << 10
"""Pieces of at least this size are copied one by one; smaller ones by one indexed copy a region."""


def copy_bytes(copies: Iterable[tuple[int, int, int]]) -> None:
    """Copy host byte ranges (source address, target address, length). Releases the interpreter lock for each."""
    move = ctypes.memmove
    for source, target, length in copies:
        move(target, source, length)


def copy_blocks(
    source: KvPool, target: KvPool, source_blocks: Sequence[int], target_blocks: Sequence[int], pattern: Pattern
) -> None:
    """Copy the same pattern between blocks of one layout. Raises `ValueError` when device memory has no copier."""
    copier = _copier(source, target)
    joined = _joined(block_runs(source, target, source_blocks, target_blocks, pattern))
    if copier is None:
        copy_bytes(joined)
    else:
        copier(list(joined))


def convert_blocks(
    source: KvPool, target: KvPool, groups: Sequence[Group], *, heads: range | None = None, layers: range | None = None
) -> None:
    """Copy tokens between pools whose layouts differ. Needs numpy.

    Raises `ValueError` when the layouts hold different models, or device memory has no copier.
    """
    copier = _copier(source, target)
    if copier is not None:
        table = runs(source, target, groups, heads=heads, layers=layers)
        copier([(int(one), int(other), int(length)) for one, other, length in table])
        return
    for group in groups:
        for copy in strided_copies(source.layout, target.layout, group, heads=heads, layers=layers):
            from_ = _strided(
                source.regions[copy.source_region],
                source.num_blocks,
                copy.source_offset,
                copy.run,
                [(count, stride) for count, stride, _ in copy.loops],
            )
            to = _strided(
                target.regions[copy.target_region],
                target.num_blocks,
                copy.target_offset,
                copy.run,
                [(count, stride) for count, _, stride in copy.loops],
            )
            if from_[0].nbytes >= _LOOP_BYTES:
                for one, other in zip(group.source_blocks, group.target_blocks, strict=True):
                    to[other] = from_[one]
            else:
                to[group.target_blocks] = from_[group.source_blocks]


def _strided(
    region: KvRegion, num_blocks: int, offset: int, run: int, loops: list[tuple[int, int]]
) -> NDArray[np.generic]:
    """An array [block, *loops] whose elements are runs of bytes."""
    import numpy as np

    extent = offset + run + sum((count - 1) * stride for count, stride in loops)
    size = (num_blocks - 1) * region.stride + extent
    memory: Any = (ctypes.c_char * size).from_address(region.address)
    return np.ndarray(
        shape=(num_blocks, *(count for count, _ in loops)),
        dtype=f"V{run}",
        buffer=memory,
        offset=offset,
        strides=(region.stride, *(stride for _, stride in loops)),
    )


def _joined(copies: Iterable[tuple[int, int, int]]) -> Iterable[tuple[int, int, int]]:
    """Join copies whose successor continues them on both sides."""
    pending: tuple[int, int, int] | None = None
    for copy in copies:
        if pending is None:
            pending = copy
        elif copy[0] == pending[0] + pending[2] and copy[1] == pending[1] + pending[2]:
            pending = (pending[0], pending[1], pending[2] + copy[2])
        else:
            yield pending
            pending = copy
    if pending is not None:
        yield pending


def _copier(source: KvPool, target: KvPool) -> Any:
    """What copies between the two; None for the processor itself."""
    device = [pool for pool in (source, target) if pool.memory is not MemoryKind.DRAM]
    for pool in device:
        if pool.copier is not None:
            return pool.copier
    if device:
        raise ValueError(
            "KV in device memory can be copied through the host only with a pool copier: pass `copier` to KvPool, or "
            "install NIXL"
        )
    return None
