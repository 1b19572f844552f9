"""Turns one engine's KV events into the normalized, closed form of `core.kv.events`.

One normalizer belongs to one rank of one worker and mirrors its prefix cache as a tree. It runs beside the engine, so
the work and the memory grow with the worker, not with the router. The tree is kept in dictionaries of numbers: that
lets the usual event, new blocks on the device, go in with a few bulk updates, and gives the garbage collector nothing
to walk through.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import pairwise

import msgspec

from core.kv.events import BlocksCleared, BlocksPlaced, BlocksRemoved, KvUpdate
from core.kv.hashing import hash_blocks, root_hash
from core.messages import KvCleared, KvEvent, KvRemoved, KvStored, Medium

log = logging.getLogger(__name__)

MEDIA = tuple(Medium)
"""From the fastest to the slowest; a block's level is its medium's place in here."""
_LEVEL = {medium: level for level, medium in enumerate(MEDIA)}
_GONE = len(MEDIA)
"""Level of what cannot be reused: slower than everything."""

Counts = dict[int, int]
"""Times stored, by level; only levels where it is stored."""


class NormalizerCounters(msgspec.Struct):
    """What was odd about an engine's events, since the start. All zero on a healthy engine."""

    malformed: int = 0
    """Stored events whose tokens, hashes and block size do not fit together; left out."""
    orphaned: int = 0
    """Blocks stored after a block that the engine never announced; left out, since nobody knows what they follow."""
    conflicting: int = 0
    """Blocks stored under an engine hash that stands for other tokens; left out with what follows them."""
    unknown_removals: int = 0
    """Removals of a hash more often than it was stored."""


class KvNormalizer:
    """Engine events in, updates out."""

    def __init__(self, block_size: int) -> None:
        """`block_size`: tokens in a block, the same for every event. Raises `ValueError` below 1."""
        if block_size < 1:
            raise ValueError(f"block size is {block_size}; expected at least 1")
        self.block_size = block_size
        self.counters = NormalizerCounters()
        self._forget_all()

    def _forget_all(self) -> None:
        self._parents: dict[int, int] = {}
        """Block to the block, or root, before it: held blocks, and gone ones while a held one follows them."""
        self._child: dict[int, int] = {}
        """Block or root to what follows it; nearly always there is one."""
        self._branches: dict[int, set[int]] = {}
        """What else follows it."""
        self._roots: set[int] = set()
        self._engine: dict[int, int] = {}
        """The engine's hash to the block, while it is stored at least once on any medium."""
        # What is stored once, on the device, is the rule; only exceptions to it have entries in these.
        self._engine_counts: dict[int, Counts] = {}
        self._counts: dict[int, Counts] = {}
        """Of a block; empty for one that is gone."""
        self._levels: dict[int, int] = {}
        """What a block counts as, where that is not 0: the slowest on its way, `_GONE` when something is missing."""

    def __len__(self) -> int:
        """Blocks that the engine holds, reusable or not."""
        return len(self._parents) - sum(not counts for counts in self._counts.values())

    def apply(self, events: list[KvEvent]) -> list[KvUpdate]:
        """What the events of one engine step change. Steps within the batch that cancel out are not seen outside."""
        changed: dict[int, int] = {}  # block to the level it was announced at
        cleared = False
        for event in events:
            if isinstance(event, KvStored):
                self._store(event, changed)
            elif isinstance(event, KvRemoved):
                self._remove(event, changed)
            elif isinstance(event, KvCleared):
                self._forget_all()
                changed.clear()
                cleared = True
        removed: list[int] = []
        pending: dict[int, None] = {}
        parents, levels = self._parents, self._levels
        for block, before in changed.items():
            after = levels.get(block, 0) if block in parents else _GONE
            if after == _GONE:
                if before != _GONE:
                    removed.append(block)
            elif after != before:
                pending[block] = None
        updates: list[KvUpdate] = [BlocksCleared()] if cleared else []
        if removed:
            updates.append(BlocksRemoved(removed))
        updates.extend(self._runs(pending))
        return updates

    def prefix(self, blocks: Iterable[int]) -> int:
        """How many of a prompt's blocks, from its first on, can be reused. Stops at the first that cannot."""
        parents, levels = self._parents, self._levels
        count = 0
        for block in blocks:
            if block not in parents or levels.get(block) == _GONE:
                break
            count += 1
        return count

    def snapshot(self) -> list[BlocksPlaced]:
        """Everything that is announced, parents first."""
        levels = self._levels
        return list(self._runs({block: None for block in self._parents if levels.get(block) != _GONE}))

    def _store(self, event: KvStored, changed: dict[int, int]) -> None:
        size, names = self.block_size, event.block_hashes
        if event.block_size != size or len(event.token_ids) != size * len(names):
            self.counters.malformed += 1
            log.warning(
                "KV event left out: %d hashes, %d tokens, block size %d; expected blocks of %d tokens each.",
                len(names), len(event.token_ids), event.block_size, size,
            )  # fmt: skip
            return
        if event.parent_hash is None:
            parent = root_hash(event.lora, event.cache_salt)
            self._roots.add(parent)
        else:
            known = self._engine.get(event.parent_hash)
            if known is None:
                self.counters.orphaned += len(names)
                return
            parent = known
        blocks = hash_blocks(event.token_ids, size, parent)
        level = _LEVEL[event.medium]
        if (
            blocks
            and not level
            and parent not in self._levels
            and len(set(names)) == len(names)
            and self._engine.keys().isdisjoint(names)
            and self._parents.keys().isdisjoint(blocks)
        ):
            self._engine.update(zip(names, blocks, strict=True))
            self._parents.update(zip(blocks, (parent, *blocks), strict=False))
            self._link(parent, blocks[0])
            self._child.update(pairwise(blocks))
            for block in blocks:
                changed.setdefault(block, _GONE)
            return
        first = parent
        for name, block in zip(names, blocks, strict=True):
            if not self._store_one(name, block, parent, level, changed):
                break
            parent = block
        if first not in self._child:
            self._roots.discard(first)

    def _store_one(self, name: int, block: int, parent: int, level: int, changed: dict[int, int]) -> bool:
        known = self._engine.get(name)
        if known is not None and known != block:
            self.counters.conflicting += 1
            return False
        if known is None:
            self._engine[name] = block
            if level:
                self._engine_counts[name] = {level: 1}
        else:
            _add(self._engine_counts.setdefault(name, {0: 1}), level)
        if block not in self._parents:
            self._parents[block] = parent
            self._link(parent, block)
            self._levels[block] = _GONE
            self._counts[block] = {}
        counts = self._counts.setdefault(block, {0: 1})
        _add(counts, level)
        if counts == {0: 1}:
            del self._counts[block]
        self._settle(block, changed)
        return True

    def _remove(self, event: KvRemoved, changed: dict[int, int]) -> None:
        level = _LEVEL[event.medium]
        for name in event.block_hashes:
            block = self._engine.get(name)
            stored = self._engine_counts.get(name)
            if block is None or not (stored.get(level) if stored is not None else level == 0):
                self.counters.unknown_removals += 1
                continue
            if stored is None and block not in self._child and block not in self._counts:
                # The usual case: the end of a sequence, stored once.
                del self._engine[name]
                changed.setdefault(block, self._levels.pop(block, 0))
                self._cut(block)
                continue
            if stored is None or not _take(stored, level):
                del self._engine[name]
                self._engine_counts.pop(name, None)
            counts = self._counts.setdefault(block, {0: 1})
            _take(counts, level)
            if counts == {0: 1}:
                del self._counts[block]
            self._settle(block, changed)
            self._prune(block)

    def _settle(self, block: int, changed: dict[int, int]) -> None:
        """Brings the levels of a block and of what follows it up to date."""
        levels, counts = self._levels, self._counts
        stack = [block]
        while stack:
            block = stack.pop()
            own = counts.get(block)
            level = levels.get(self._parents[block], 0)
            if own is not None:
                level = max(level, min(own, default=_GONE))
            before = levels.get(block, 0)
            if level == before:
                continue
            changed.setdefault(block, before)
            if level:
                levels[block] = level
            else:
                del levels[block]
            stack.extend(self._children(block))

    def _prune(self, block: int) -> None:
        """Drops a block that is gone, and those before it, while nothing follows."""
        if block not in self._child and self._counts.get(block) == {}:
            del self._counts[block]
            self._levels.pop(block, None)
            self._cut(block)

    def _cut(self, block: int) -> None:
        """Takes a block that nothing follows out of the tree."""
        parent = self._parents.pop(block)
        if parent not in self._branches:
            del self._child[parent]
            if parent in self._roots:
                self._roots.discard(parent)
            elif parent in self._counts:
                self._prune(parent)
            return
        branches = self._branches[parent]
        branches.discard(block)
        if self._child[parent] == block:
            self._child[parent] = branches.pop()
        if not branches:
            del self._branches[parent]

    def _children(self, block: int) -> Iterator[int]:
        child = self._child.get(block)
        if child is not None:
            yield child
            yield from self._branches.get(block, ())

    def _link(self, parent: int, block: int) -> None:
        if self._child.setdefault(parent, block) != block:
            self._branches.setdefault(parent, set()).add(block)

    def _runs(self, pending: dict[int, None]) -> Iterator[BlocksPlaced]:
        """Cuts blocks into runs, a parent always before its children. `pending` is used up."""
        parents, levels = self._parents, self._levels
        for start in list(pending):
            if start not in pending:
                continue
            block = start
            while parents[block] in pending:
                block = parents[block]
            # The run goes down from the highest pending ancestor while its level stays the same; what branches off, or
            # lies elsewhere, starts a run of its own later, when its parent has been announced.
            parent, level, hashes = parents[block], levels.get(block, 0), []
            following: int | None = block
            while following is not None:
                del pending[following]
                hashes.append(following)
                child = self._child.get(following)
                if child in pending and levels.get(child, 0) == level:
                    following = child
                else:
                    branches = self._branches.get(following, ())
                    following = next((c for c in branches if c in pending and levels.get(c, 0) == level), None)
            yield BlocksPlaced(hashes, None if parent in self._roots else parent, MEDIA[level])

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the tree contradicts itself. Costs a walk over everything."""
        reached = 0
        stack = list(self._roots)
        while stack:
            block = stack.pop()
            for child in self._children(block):
                assert self._parents.get(child) == block, f"block {child:#x} does not know its parent"
                stack.append(child)
            if block in self._roots:
                continue
            reached += 1
            own = min(self._counts.get(block, {0: 1}), default=_GONE)
            level = max(own, self._levels.get(self._parents[block], 0))
            assert self._levels.get(block, 0) == level, f"block {block:#x} has a stale level"
            assert own != _GONE or block in self._child, f"block {block:#x} is gone but kept"
        assert reached == len(self._parents), f"{len(self._parents)} blocks in the table, {reached} in the tree"
        stored: dict[int, Counts] = {}
        for name, block in self._engine.items():
            total = stored.setdefault(block, {})
            for level, count in self._engine_counts.get(name, {0: 1}).items():
                total[level] = total.get(level, 0) + count
        for block in self._parents:
            expected = self._counts.get(block, {0: 1})
            assert stored.get(block, {}) == expected, f"block {block:#x} is stored {stored.get(block)}, not {expected}"
        for keyed, table in ((self._engine_counts, self._engine), (self._counts, self._parents)):
            assert keyed.keys() <= table.keys(), "counts are kept for what is not stored"
        assert self._levels.keys() <= self._parents.keys(), "levels are kept for blocks that are gone"
        assert 0 not in self._levels.values(), "a level of 0 is kept as an exception"


def _add(counts: Counts, level: int) -> None:
    counts[level] = counts.get(level, 0) + 1


def _take(counts: Counts, level: int) -> bool:
    """Takes one from `counts[level]`; False when nothing is left on any level."""
    counts[level] -= 1
    if not counts[level]:
        del counts[level]
    return bool(counts)
