"""Packs a step's chunks into the tensors that the model and its attention take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.torch.attention import Group, Paged
from engines.torch.kv_cache import PagedCache
from engines.torch.scheduler import Chunk

PAD_LIMIT = 64
"""Chunks of more tokens attend alone; shorter ones share a padded batch."""
GROUP_TOKENS = 16384
"""Most context tokens, padding included, that one group gathers: bounds what a layer copies at once."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Member:
    """One chunk's place in the packed batch: `count` rows from `row`, at positions from `start`."""

    row: int
    start: int
    count: int
    table: Ints


def pack(chunks: list[Chunk], cache: PagedCache, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Paged]:
    """Token ids [1, T], positions [1, T], and what attention needs. Blocks for all tokens must be allocated."""
    ids: list[int] = []
    members: list[Member] = []
    total = sum(chunk.size for chunk in chunks)
    positions = np.empty(total, np.int64)
    slots = np.empty(total, np.int64)
    size = cache.block_size
    for sequence, count in chunks:
        start, row = sequence.num_computed, len(ids)
        table = np.frombuffer(sequence.block_table, np.int64)
        members.append(Member(row, start, count, table))
        ids += sequence.token_ids[start : start + count]
        if count == 1:
            positions[row] = start
            slots[row] = table[start // size] * size + start % size
        else:
            place = positions[row : row + count] = np.arange(start, start + count)
            slots[row : row + count] = table[place // size] * size + place % size
    groups = {window: _groups(members, total, window, size, dtype, device) for window in cache.windows}
    paged = Paged(cache, _move(slots, device), groups)
    return _move(np.array([ids]), device), _move(positions[None], device), paged


def _groups(
    members: list[Member], total: int, window: int | None, size: int, dtype: torch.dtype, device: str
) -> list[Group]:
    alike: dict[tuple[int, int], list[Member]] = {}
    groups = []
    for member in members:
        if member.count > PAD_LIMIT:
            groups.append(_group([member], total, window, size, dtype, device))
        else:
            blocks = -(-(member.start + member.count) // size) - _first_block(member, window, size)
            # Powers of two bound the padding to a factor of two; the small ones are not worth telling apart.
            kind = ((member.count - 1).bit_length(), max(blocks, 512 // size).bit_length())
            alike.setdefault(kind, []).append(member)
    for (_, bits), kindred in alike.items():
        most = max(1, GROUP_TOKENS // (size << bits))
        groups += [
            _group(kindred[at : at + most], total, window, size, dtype, device) for at in range(0, len(kindred), most)
        ]
    return groups


def _group(members: list[Member], total: int, window: int | None, size: int, dtype: torch.dtype, device: str) -> Group:
    batch, length = len(members), max(member.count for member in members)
    starts = np.array([member.start for member in members])
    counts = np.array([member.count for member in members])
    rows = np.array([member.row for member in members])
    steps = np.minimum(np.arange(length), counts[:, None] - 1)
    all_rows = (rows[:, None] + steps).reshape(-1)
    whole = len(all_rows) == total and bool((all_rows == np.arange(total)).all())
    row_index = None if whole else _move(all_rows, device)
    if batch == 1 and starts[0] == 0 and (window is None or length <= window):
        return Group((1, length), row_index, None, None)
    firsts = np.array([_first_block(member, window, size) for member in members])
    ends = -(-(starts + counts) // size)
    width = int((ends - firsts).max())
    tables = np.zeros((batch, width), np.int64)
    for index, member in enumerate(members):
        part = member.table[firsts[index] : ends[index]]
        tables[index, : len(part)] = part
    at = _move(starts[:, None] + steps, device)[:, :, None]
    of = _move(firsts[:, None] * size + np.arange(width * size), device)[:, None, :]
    hidden = of > at
    if window is not None:
        hidden |= of <= at - window
    mask = torch.zeros((batch, 1, length, width * size), dtype=dtype, device=device)
    mask.masked_fill_(hidden[:, None], -torch.inf)
    return Group((batch, length), row_index, _move(tables.reshape(-1), device), mask)


def _first_block(member: Member, window: int | None, size: int) -> int:
    return 0 if window is None else max(0, member.start - window + 1) // size


def _move(numbers: Ints, device: str) -> Tensor:
    tensor = torch.from_numpy(numbers)
    return tensor if device == "cpu" else tensor.to(device, non_blocking=True)
