"""How tokens get from blocks of one layout into blocks of another: the byte copies, coalesced.

Blocks of one list hold a sequence's tokens in order. A copy takes `tokens` tokens from `source_skip` in the source
list to `target_skip` in the target list. Tokens that share their place within both blocks form a `Group`, so that one
pattern of strided copies serves every block pair of a group, and nothing here loops over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from core.kv.layout import KvLayout
from core.kv.transfer.pool import Pattern, PoolGeometry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Runs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Block pairs between which the same token ranges are copied."""

    source_token: int
    target_token: int
    tokens: int
    source_blocks: list[int]
    target_blocks: list[int]


@dataclass(frozen=True, slots=True)
class Strided:
    """`run` contiguous bytes, repeated over nested loops (count, source stride, target stride), outermost first."""

    source_region: int
    source_offset: int
    target_region: int
    target_offset: int
    run: int
    loops: tuple[tuple[int, int, int], ...]


def token_groups(
    source_size: int,
    target_size: int,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    *,
    tokens: int,
    source_skip: int = 0,
    target_skip: int = 0,
) -> list[Group]:
    """Cut a token range at the block boundaries of both sides. Sizes are tokens a block.

    Raises `ValueError` when a list is too short for the range.
    """
    for name, blocks, size, skip in (
        ("source", source_blocks, source_size, source_skip),
        ("target", target_blocks, target_size, target_skip),
    ):
        if skip < 0 or tokens < 0 or len(blocks) * size < skip + tokens:
            raise ValueError(
                f"{tokens} tokens after {skip} do not fit the {name} list of {len(blocks)} blocks of {size} tokens"
            )
    groups: dict[tuple[int, int, int], Group] = {}
    done = 0
    while done < tokens:
        source_index, source_token = divmod(source_skip + done, source_size)
        target_index, target_token = divmod(target_skip + done, target_size)
        step = min(source_size - source_token, target_size - target_token, tokens - done)
        key = (source_token, target_token, step)
        group = groups.get(key)
        if group is None:
            group = groups[key] = Group(source_token, target_token, step, [], [])
        group.source_blocks.append(source_blocks[source_index])
        group.target_blocks.append(target_blocks[target_index])
        done += step
    return list(groups.values())


def strided_copies(
    source: KvLayout,
    target: KvLayout,
    group: Group,
    *,
    heads: range | None = None,
    layers: range | None = None,
) -> list[Strided]:
    """The copies of one block pair of a group, each with the longest runs that both layouts allow.

    `heads` (of the whole model) defaults to those that both ranks hold, `layers` to all. Raises `ValueError` when the
    layouts hold different models, or a side lacks one of the heads.
    """
    target.require_convertible(source)
    if heads is None:
        heads = range(max(source.heads.start, target.heads.start), min(source.heads.stop, target.heads.stop))
    if not heads or any(heads[end] not in side.heads for side in (source, target) for end in (0, -1)):
        raise ValueError(
            f"heads {list(heads)} are not on both sides: source rank holds {list(source.heads)}, "
            f"target rank {list(target.heads)}"
        )
    layers = range(source.layers) if layers is None else layers
    if not layers or layers.start < 0 or layers.stop > source.layers or layers.step != 1:
        raise ValueError(f"layers {layers} are not a range within the model's {source.layers}")
    from_, to = source.strides, target.strides
    inner = [(group.tokens, from_["N"], to["N"]), (len(heads), from_["H"], to["H"])]
    starts: list[tuple[int, int]] = [(layer, part) for layer in layers for part in range(source.parts)]
    for letter, count in (("K", source.parts), ("L", len(layers))):
        if letter in from_ and letter in to:
            inner.append((count, from_[letter], to[letter]))
            fixed = 1 if letter == "K" else 0
            first = 0 if letter == "K" else layers.start
            starts = [start for start in starts if start[fixed] == first]
    run, loops = _merge(source.vector_bytes, inner)
    copies: list[Strided] = []
    for layer, part in starts:
        source_region, source_offset = source.locate(layer, part)
        target_region, target_offset = target.locate(layer, part)
        source_offset += group.source_token * from_["N"] + (heads.start - source.heads.start) * from_["H"]
        target_offset += group.target_token * to["N"] + (heads.start - target.heads.start) * to["H"]
        copies.append(Strided(source_region, source_offset, target_region, target_offset, run, loops))
    return copies


def narrow_pattern(
    source: KvLayout, *, heads: range | None, layers: range | None, tokens: tuple[int, int] | None = None
) -> Pattern:
    """The pieces of a `source` block that hold the heads, layers and tokens [start, stop) asked for, coalesced."""
    start, stop = (0, source.block_size) if tokens is None else tokens
    group = Group(start, start, stop - start, [0], [0])
    pieces: list[tuple[int, int, int]] = []
    for copy in strided_copies(source, source, group, heads=source.heads if heads is None else heads, layers=layers):
        offsets = [copy.source_offset]
        for count, stride, _ in copy.loops:
            offsets = [offset + index * stride for offset in offsets for index in range(count)]
        pieces += [(copy.source_region, offset, copy.run) for offset in offsets]
    pieces.sort()
    merged = pieces[:1]
    for (region, offset, length), piece in pairwise(pieces):
        if piece[0] == region and piece[1] == offset + length:
            first = merged[-1]
            merged[-1] = (region, first[1], first[2] + piece[2])
        else:
            merged.append(piece)
    return tuple(merged)


def runs(source: PoolGeometry, target: PoolGeometry, groups: Sequence[Group], **which: Any) -> Runs:
    """Every byte copy of a plan as rows (source address, target address, bytes), neighbours coalesced.

    `which` is `heads` and `layers` of `strided_copies`. Shape [copies, 3]. Needs numpy.
    """
    import numpy as np

    parts: list[Runs] = []
    for group in groups:
        for copy in strided_copies(source.layout, target.layout, group, **which):
            source_region, target_region = source.regions[copy.source_region], target.regions[copy.target_region]
            from_ = np.asarray(group.source_blocks, np.int64) * source_region.stride
            to = np.asarray(group.target_blocks, np.int64) * target_region.stride
            from_ += source_region.address + copy.source_offset
            to += target_region.address + copy.target_offset
            for count, source_stride, target_stride in copy.loops:
                index = np.arange(count, dtype=np.int64)
                from_ = (from_[:, None] + index * source_stride).reshape(-1)
                to = (to[:, None] + index * target_stride).reshape(-1)
            parts.append(np.stack([from_, to, np.full(len(from_), copy.run, np.int64)], axis=1))
    if not parts:
        return np.zeros((0, 3), np.int64)
    return _coalesce(np.concatenate(parts))


def block_runs(
    source: PoolGeometry,
    target: PoolGeometry,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    pattern: Pattern,
) -> Iterator[tuple[int, int, int]]:
    """Copies (source address, target address, bytes) of the same pattern in blocks of one layout."""
    for region, offset, length in pattern:
        from_, to = source.regions[region], target.regions[region]
        for one, other in zip(source_blocks, target_blocks, strict=True):
            yield from_.address + one * from_.stride + offset, to.address + other * to.stride + offset, length


def _merge(run: int, loops: list[tuple[int, int, int]]) -> tuple[int, tuple[tuple[int, int, int], ...]]:
    """Grow the contiguous run through every loop that continues it on both sides; order the rest for locality."""
    left = sorted((loop for loop in loops if loop[0] > 1), key=lambda loop: (loop[2], loop[1]))
    grown = True
    while grown:
        grown = False
        for loop in left:
            if loop[1] == loop[2] == run:
                run *= loop[0]
                left.remove(loop)
                grown = True
                break
    return run, tuple(reversed(left))


def _coalesce(rows: Runs) -> Runs:
    """Join rows whose successor continues them on both sides."""
    import numpy as np

    ends = rows[:-1, :2] + rows[:-1, 2:]
    starts = np.concatenate([[True], (rows[1:, :2] != ends).any(axis=1)])
    first = np.flatnonzero(starts)
    joined = rows[first]
    joined[:, 2] = np.add.reduceat(rows[:, 2], first)
    return joined
