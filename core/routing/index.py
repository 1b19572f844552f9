"""Block hash to the set of targets that hold the block, searched by bisection.

A set of targets is an integer with one bit a target, and each medium has a dictionary from block hash to such an
integer. The blocks of a target are closed (see `core.kv.events`): whoever holds a block holds all before it. So along a
prompt's chain the set only shrinks, in as many steps as there are groups of targets that share an end, and bisection
finds the steps: a prompt of 8,192 blocks that two groups of workers share costs some fifteen dictionary look-ups.

The index guards the closure itself: blocks placed after a block that the target does not hold are refused. What it
cannot see is a removal that leaves later blocks behind; `KvNormalizer` never publishes one.

Bounds. At most `max_blocks` different blocks are kept. When they are reached new blocks are refused and counted: the
ends of chains are lost, never their beginnings, and blocks that are removed make room again. Everything else would
break the closure or would forget blocks that workers still hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import msgspec

from core.kv import BlocksCleared, BlocksPlaced, BlocksRemoved, KvUpdate, Target
from core.messages import Medium
from core.routing.overlap import EMPTY, Overlap

MEDIA = tuple(Medium)
_LEVEL = {medium: level for level, medium in enumerate(MEDIA)}
_SHARED_SETS = 4096
"""Sets kept to be shared between blocks; past it the memory of them is cleared and begins anew."""


class IndexCounters(msgspec.Struct):
    """What the index left out, since the start."""

    refused_full: int = 0
    """Blocks that came when `max_blocks` were held."""
    refused_unreachable: int = 0
    """Blocks placed after one that the target does not hold: their beginning was refused, or an event was lost."""


class _Slot:
    """A target's bit, and how many blocks it has on each level."""

    __slots__ = ("bit", "counts", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.bit = 1 << number
        self.counts = [0] * len(MEDIA)


class PrefixIndex:
    """Which targets hold which blocks. A `BlockSink`: `KvFollower` feeds it. Not thread-safe."""

    def __init__(self, *, max_blocks: int = 8_000_000) -> None:
        """`max_blocks`: different blocks at most, about 100 bytes each. Raises `ValueError` below 1."""
        if max_blocks < 1:
            raise ValueError(f"max_blocks is {max_blocks}; expected at least 1")
        self.max_blocks = max_blocks
        self.counters = IndexCounters()
        self._tables: list[dict[int, int]] = [{} for _ in MEDIA]
        self._slots: dict[Target, _Slot] = {}
        self._by_number: list[Target | None] = []
        self._live = 0
        """Bits of the targets in `_slots`. Other bits may linger in the tables until the sweep gets to them."""
        self._retired = 0
        """Bits given up since the sweep that is under way began."""
        self._sweeping = 0
        """Bits that the sweep under way erases."""
        self._to_sweep: list[tuple[int, list[int]]] = []
        self._sets: dict[int, int] = {}
        self._members: dict[int, tuple[Target, ...]] = {}

    def __len__(self) -> int:
        """Blocks in memory, counted once a medium. Those of lost targets count until they are swept."""
        return sum(map(len, self._tables))

    @property
    def targets(self) -> tuple[Target, ...]:
        """Targets that something was placed for."""
        return tuple(self._slots)

    def blocks_of(self, target: Target) -> int:
        """Blocks that the target holds, on any medium."""
        slot = self._slots.get(target)
        return sum(slot.counts) if slot is not None else 0

    def apply(self, target: Target, updates: Sequence[KvUpdate]) -> None:
        """Carries out a worker's updates in order. See `place`, `remove`, `clear`."""
        for update in updates:
            if isinstance(update, BlocksPlaced):
                self.place(target, update.hashes, update.parent, update.medium)
            elif isinstance(update, BlocksRemoved):
                self.remove(target, update.hashes)
            elif isinstance(update, BlocksCleared):
                self.forget(target)

    def place(
        self, target: Target, hashes: Sequence[int], parent: int | None = None, medium: Medium = Medium.DEVICE
    ) -> None:
        """The target holds these consecutive blocks after `parent`, on `medium` and on no other. Idempotent."""
        slot = self._slots.get(target)
        if slot is None:
            slot = self._slots[target] = self._new_slot(target)
        bit = slot.bit
        if parent is not None and not any(table.get(parent, 0) & bit for table in self._tables):
            self.counters.refused_unreachable += len(hashes)
            return
        level = _LEVEL[medium]
        table = self._tables[level]
        room = self.max_blocks - len(self)
        if len(hashes) > room and (fit := self._count_fitting(hashes, table, room)) < len(hashes):
            self.counters.refused_full += len(hashes) - fit
            hashes = hashes[:fit]
        get = table.get
        added = 0
        # Neighbours usually have the same set: its successor is made once a run and shared.
        shared = successor = 0
        for block in hashes:
            held = get(block)
            if held is None:
                table[block] = bit
            elif held is shared:
                table[block] = successor
            elif not held & bit:
                shared = held
                successor = table[block] = self._share(held | bit)
            else:
                continue
            added += 1
        slot.counts[level] += added
        for other, count in enumerate(slot.counts):
            if count and other != level:
                slot.counts[other] -= _erase(self._tables[other], bit, hashes)
        if self._to_sweep:
            self.sweep(2 * len(hashes) + 64)

    def remove(self, target: Target, hashes: Sequence[int]) -> None:
        """The target no longer holds these blocks; none of its remaining ones may follow them. Idempotent."""
        slot = self._slots.get(target)
        if slot is None:
            return
        for level, count in enumerate(slot.counts):
            if count:
                slot.counts[level] -= _erase(self._tables[level], slot.bit, hashes)
        if self._to_sweep:
            self.sweep(2 * len(hashes) + 64)

    def forget(self, target: Target) -> None:
        """Drops a target at once: no later lookup names it. Its memory is freed step by step, see `sweep`."""
        slot = self._slots.pop(target, None)
        if slot is None:
            return
        self._live ^= slot.bit
        self._by_number[slot.number] = None
        self._members.clear()
        if any(slot.counts):
            self._retired |= slot.bit
            self._start_sweep()

    def sweep(self, blocks: int) -> bool:
        """Frees what forgotten targets left, looking at up to `blocks` blocks; True when something is left to do.

        Every `place` and `remove` does a little of it; an idle owner may do more.
        """
        while blocks > 0 and self._to_sweep:
            level, keys = self._to_sweep[-1]
            table, keep = self._tables[level], ~self._sweeping
            for _ in range(min(blocks, len(keys))):
                blocks -= 1
                block = keys.pop()
                held = table.get(block)
                if held is None:
                    continue
                left = held & keep
                if not left:
                    del table[block]
                elif left != held:
                    table[block] = self._share(left)
            if not keys:
                self._to_sweep.pop()
            if not self._to_sweep:
                self._sweeping = 0
                self._start_sweep()
        return bool(self._to_sweep)

    def match(self, hashes: Sequence[int]) -> Overlap:
        """How far each target holds this chain. `hashes` are the prompt's chained hashes, from its first block."""
        if not hashes:
            return EMPTY
        levels = [level for level, table in enumerate(self._tables) if table]
        reach: dict[Target, int] = {}
        slower: dict[Medium, dict[Target, int]] = {}
        for position, level in enumerate(levels):
            found = self._reach(hashes, self._getter(levels[: position + 1]))
            if level:
                # Reachable with this medium but not without it: these blocks lie on it.
                more = {t: n - reach.get(t, 0) for t, n in found.items() if n > reach.get(t, 0)}
                if more:
                    slower[MEDIA[level]] = more
            reach = found
        return Overlap(reach, slower)

    def _reach(self, hashes: Sequence[int], get: Callable[[int, int], int]) -> dict[Target, int]:
        """Leading blocks of each target, over the tables behind `get`."""
        found: dict[Target, int] = {}
        last = len(hashes) - 1
        first_set = get(hashes[0], 0)
        if not first_set:
            return found
        last_set = get(hashes[last], 0)
        if last_set:
            found.update(dict.fromkeys(self._targets_in(last_set), last + 1))
        # Between two places with equal sets nothing changes; between others, look in the middle.
        spans = [(0, first_set, last, last_set)] if first_set != last_set else []
        while spans:
            low, low_set, high, high_set = spans.pop()
            while high - low > 1:
                middle = (low + high) // 2
                held = get(hashes[middle], 0)
                if held == low_set:
                    low = middle
                else:
                    if held != high_set:
                        spans.append((middle, held, high, high_set))
                    high, high_set = middle, held
            ended = self._targets_in(low_set & ~high_set)
            if len(ended) == 1:
                found[ended[0]] = high
            else:
                found.update(dict.fromkeys(ended, high))
        return found

    def _getter(self, levels: list[int]) -> Callable[[int, int], int]:
        """A block's live holders on any of the levels. Holders that were forgotten are there until they are swept."""
        tables = [self._tables[level] for level in levels]
        if len(tables) == 1 and not self._retired and not self._sweeping:
            return tables[0].get
        live = self._live

        def get(block: int, default: int) -> int:
            held = default
            for table in tables:
                held |= table.get(block, 0)
            return held & live

        return get

    def _targets_in(self, members: int) -> tuple[Target, ...]:
        """The targets of a set of live bits."""
        known = self._members.get(members)
        if known is not None:
            return known
        found = []
        rest = members
        while rest:
            bit = rest & -rest
            target = self._by_number[bit.bit_length() - 1]
            assert target is not None, "a live bit has no target"
            found.append(target)
            rest ^= bit
        if len(self._members) >= _SHARED_SETS:
            self._members.clear()
        known = self._members[members] = tuple(found)
        return known

    def _share(self, members: int) -> int:
        """One object for equal sets, as far as memory of them reaches."""
        if len(self._sets) >= _SHARED_SETS:
            self._sets.clear()
        return self._sets.setdefault(members, members)

    def _count_fitting(self, hashes: Sequence[int], table: dict[int, int], room: int) -> int:
        """How many of the leading blocks can be placed with room for `room` new ones."""
        for number, block in enumerate(hashes):
            if block not in table:
                if room <= 0:
                    return number
                room -= 1
        return len(hashes)

    def _new_slot(self, target: Target) -> _Slot:
        waiting = self._retired | self._sweeping
        for number, owner in enumerate(self._by_number):
            if owner is None and not waiting >> number & 1:
                break
        else:
            number = len(self._by_number)
            self._by_number.append(None)
        self._by_number[number] = target
        slot = _Slot(number)
        self._live |= slot.bit
        return slot

    def _start_sweep(self) -> None:
        if self._sweeping or not self._retired:
            return
        self._sweeping, self._retired = self._retired, 0
        self._sets.clear()
        self._to_sweep = [(level, list(table)) for level, table in enumerate(self._tables) if table]
        if not self._to_sweep:
            self._sweeping = 0

    def check_integrity(self, sample: int | None = None) -> None:
        """Raises `AssertionError` when tables, slots and counts disagree. Looks at every block, or at `sample` ones."""
        live = 0
        for target, slot in self._slots.items():
            assert self._by_number[slot.number] == target, f"bit {slot.number} is not {target}'s"
            assert not slot.bit & (live | self._retired | self._sweeping), f"bit {slot.number} has two meanings"
            live |= slot.bit
        assert live == self._live, "the live bits are not those of the slots"
        assert bool(self._sweeping) == bool(self._to_sweep), "a sweep has bits but no blocks, or blocks but no bits"
        known = live | self._retired | self._sweeping
        totals = {target: [0] * len(MEDIA) for target in self._slots}
        seen: dict[int, int] = {}
        for level, table in enumerate(self._tables):
            for block, held in islice(table.items(), sample):
                assert held, f"block {block:#x} is kept for nobody"
                assert not held & ~known, f"block {block:#x} has bits of nobody: {held & ~known:#b}"
                assert not seen.get(block, 0) & held & live, f"block {block:#x} is on two media of one target"
                seen[block] = seen.get(block, 0) | held
                for target in self._targets_in(held & live):
                    totals[target][level] += 1
        if sample is None:
            counts = {target: slot.counts for target, slot in self._slots.items()}
            assert totals == counts, f"targets hold {totals}, counted were {counts}"
            assert len(self) <= self.max_blocks, f"{len(self)} blocks are kept, {self.max_blocks} are allowed"


def _erase(table: dict[int, int], bit: int, hashes: Sequence[int]) -> int:
    """Takes a bit out of blocks; gives how many had it."""
    erased = 0
    shared = predecessor = 0
    get = table.get
    for block in hashes:
        held = get(block)
        if held is None or not held & bit:
            continue
        erased += 1
        if held == bit:
            del table[block]
        else:
            if held is not shared:
                shared, predecessor = held, held ^ bit
            table[block] = predecessor
    return erased
