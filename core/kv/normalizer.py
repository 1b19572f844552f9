"""Turns one engine's KV events into the normalized, closed form of `core.kv.events`.

One normalizer belongs to one rank of one worker and mirrors its prefix cache as a tree of nodes. It runs beside the
engine, so the work and the memory grow with the worker, not with the router.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

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


class NormalizerCounters(msgspec.Struct):
    """What was odd about an engine's events, since the start. All zero on a healthy engine."""

    malformed: int = 0
    """Stored events whose tokens, hashes and block size do not fit together; left out."""
    orphaned: int = 0
    """Blocks stored after a block that the engine never announced; left out, since nobody knows what they follow."""
    conflicting: int = 0
    """Blocks stored under an engine hash that stands for other tokens; left out."""
    unknown_removals: int = 0
    """Removals of a hash more often than it was stored."""


class _Node:
    """A block of the mirrored cache. `level` is what it counts as; `own` is where it lies by itself."""

    # Nearly every block is followed by at most one: only the others have room for a set.
    __slots__ = ("branches", "child", "counts", "hash", "level", "own", "parent")

    def __init__(self, block_hash: int, parent: _Node | None, level: int) -> None:
        self.hash = block_hash
        self.parent = parent
        self.child: _Node | None = None
        self.branches: set[_Node] | None = None
        self.counts: dict[int, int] | None = None
        """Times stored by level; None stands for the usual {0: 1} or, with `own` gone, for nothing."""
        self.own = _GONE
        self.level = level

    def children(self) -> Iterator[_Node]:
        if self.child is not None:
            yield self.child
        if self.branches is not None:
            yield from self.branches

    def unlink(self, child: _Node) -> None:
        if self.branches is not None:
            self.branches.discard(child)
            if self.child is child:
                self.child = self.branches.pop()
            if not self.branches:
                self.branches = None
        else:
            self.child = None


class KvNormalizer:
    """Engine events in, updates out."""

    def __init__(self, block_size: int) -> None:
        """`block_size`: tokens in a block, the same for every event. Raises `ValueError` below 1."""
        if block_size < 1:
            raise ValueError(f"block size is {block_size}; expected at least 1")
        self.block_size = block_size
        self.counters = NormalizerCounters()
        self._roots: dict[int, _Node] = {}
        self._nodes: dict[int, _Node] = {}
        """Chained hash to node: held blocks, and blocks that are gone while a held one follows them."""
        self._engine: dict[int, _Node] = {}
        """The engine's hash to node, while it is stored at least once on any medium."""
        self._engine_counts: dict[int, dict[int, int]] = {}
        """Times stored by level, for engine hashes that are stored otherwise than once on the device."""

    def __len__(self) -> int:
        """Blocks that the engine holds, reusable or not."""
        return sum(node.own != _GONE for node in self._nodes.values())

    def apply(self, events: list[KvEvent]) -> list[KvUpdate]:
        """What the events of one engine step change. Steps within the batch that cancel out are not seen outside."""
        changed: dict[_Node, int] = {}  # node to the level it was announced at
        cleared = False
        for event in events:
            if isinstance(event, KvStored):
                self._store(event, changed)
            elif isinstance(event, KvRemoved):
                self._remove(event, changed)
            elif isinstance(event, KvCleared):
                self._clear()
                changed.clear()
                cleared = True
        removed = [node.hash for node, before in changed.items() if before != _GONE and node.level == _GONE]
        updates: list[KvUpdate] = [BlocksCleared()] if cleared else []
        if removed:
            updates.append(BlocksRemoved(removed))
        updates.extend(_runs({node: None for node, before in changed.items() if node.level not in (before, _GONE)}))
        return updates

    def snapshot(self) -> list[BlocksPlaced]:
        """Everything that is announced, parents first."""
        return list(_runs({node: None for node in self._nodes.values() if node.level != _GONE}))

    def _store(self, event: KvStored, changed: dict[_Node, int]) -> None:
        size = self.block_size
        if event.block_size != size or len(event.token_ids) != size * len(event.block_hashes):
            self.counters.malformed += 1
            log.warning(
                "KV event left out: %d hashes, %d tokens, block size %d; expected blocks of %d tokens each.",
                len(event.block_hashes), len(event.token_ids), event.block_size, size,
            )  # fmt: skip
            return
        parent = self._parent_of(event)
        if parent is None:
            self.counters.orphaned += len(event.block_hashes)
            return
        level = _LEVEL[event.medium]
        nodes, engine = self._nodes, self._engine
        for engine_hash, block_hash in zip(
            event.block_hashes, hash_blocks(event.token_ids, size, parent.hash), strict=True
        ):
            known = engine.get(engine_hash)
            if known is not None and known.hash != block_hash:
                self.counters.conflicting += 1
                return
            node = nodes.get(block_hash)
            if node is None:
                node = nodes[block_hash] = _Node(block_hash, parent, _GONE)
                if parent.child is None:
                    parent.child = node
                elif parent.branches is None:
                    parent.branches = {node}
                else:
                    parent.branches.add(node)
            if known is None:
                engine[engine_hash] = node
                if level:
                    self._engine_counts[engine_hash] = {level: 1}
            else:
                counts = self._engine_counts.setdefault(engine_hash, {0: 1})
                counts[level] = counts.get(level, 0) + 1
            if node.own == _GONE and not level:
                node.own = 0
            else:
                if node.counts is None:
                    node.counts = {} if node.own == _GONE else {0: 1}
                node.counts[level] = node.counts.get(level, 0) + 1
                node.own = min(node.counts)
            if node.child is None:
                at = node.own if node.own > parent.level else parent.level
                if at != node.level:
                    changed.setdefault(node, node.level)
                    node.level = at
            else:
                self._settle(node, changed)
            parent = node

    def _remove(self, event: KvRemoved, changed: dict[_Node, int]) -> None:
        level = _LEVEL[event.medium]
        for engine_hash in event.block_hashes:
            node = self._engine.get(engine_hash)
            counts = self._engine_counts.get(engine_hash) if node is not None else None
            if node is None or not (counts.get(level) if counts is not None else level == 0):
                self.counters.unknown_removals += 1
                continue
            if counts is None or not _take(counts, level):
                del self._engine[engine_hash]
                self._engine_counts.pop(engine_hash, None)
            if node.counts is None or not _take(node.counts, level):
                node.counts, node.own = None, _GONE
            else:
                node.own = min(node.counts)
            self._settle(node, changed)
            self._prune(node)

    def _clear(self) -> None:
        self._roots.clear()
        self._nodes.clear()
        self._engine.clear()
        self._engine_counts.clear()

    def _parent_of(self, event: KvStored) -> _Node | None:
        if event.parent_hash is not None:
            return self._engine.get(event.parent_hash)
        root = root_hash(event.lora, event.cache_salt)
        node = self._roots.get(root)
        if node is None:
            node = self._roots[root] = _Node(root, None, 0)
        return node

    def _settle(self, node: _Node, changed: dict[_Node, int]) -> None:
        """Brings the levels of a node and of what follows it up to date."""
        stack = [node]
        while stack:
            node = stack.pop()
            assert node.parent is not None, "a root never changes"
            level = max(node.own, node.parent.level)
            if level == node.level:
                continue
            changed.setdefault(node, node.level)
            node.level = level
            stack.extend(node.children())

    def _prune(self, node: _Node) -> None:
        """Drops nodes that are gone and that nothing held follows."""
        while node.own == _GONE and node.child is None and node.parent is not None:
            del self._nodes[node.hash]
            node.parent.unlink(node)
            node = node.parent
        if node.parent is None and node.child is None:
            self._roots.pop(node.hash, None)

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the tree contradicts itself. Costs a walk over everything."""
        reachable = 0
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                reachable += 1
                assert self._nodes.get(node.hash) is node, f"block {node.hash:#x} is in the tree but not in the table"
                assert node.level == max(node.own, node.parent.level), f"block {node.hash:#x} has a stale level"
                assert node.own != _GONE or node.child, f"block {node.hash:#x} is gone but kept"
                assert node.counts is None or (
                    all(count > 0 for count in node.counts.values()) and node.own == min(node.counts)
                ), f"block {node.hash:#x} counts {node.counts}, lies on level {node.own}"
            for child in node.children():
                assert child.parent is node, f"block {child.hash:#x} does not know its parent"
                stack.append(child)
        assert reachable == len(self._nodes), f"{len(self._nodes)} blocks in the table, {reachable} in the tree"
        stored: dict[_Node, dict[int, int]] = {}
        for engine_hash, node in self._engine.items():
            total = stored.setdefault(node, {})
            for level, count in self._engine_counts.get(engine_hash, {0: 1}).items():
                total[level] = total.get(level, 0) + count
        for node in self._nodes.values():
            expected = node.counts if node.counts is not None else ({} if node.own == _GONE else {0: 1})
            assert stored.get(node, {}) == expected, (
                f"block {node.hash:#x} is stored {stored.get(node)}, not {expected}"
            )
        assert self._engine_counts.keys() <= self._engine.keys(), "counts are kept for hashes that are not stored"


def _take(counts: dict[int, int], level: int) -> bool:
    """Takes one from `counts[level]`; False when nothing is left on any level."""
    counts[level] -= 1
    if not counts[level]:
        del counts[level]
    return bool(counts)


def _runs(pending: dict[_Node, None]) -> Iterator[BlocksPlaced]:
    """Cuts nodes into runs, a parent always before its children. `pending` is used up."""
    for node in list(pending):
        if node not in pending:
            continue
        while node.parent in pending:
            node = node.parent
        # The run goes down from the highest pending ancestor while its level stays the same; what branches off, or
        # lies elsewhere, starts a run of its own later, when its parent has been announced.
        parent, level, hashes = node.parent, node.level, []
        following: _Node | None = node
        while following is not None:
            del pending[following]
            hashes.append(following.hash)
            following = next((c for c in following.children() if c in pending and c.level == level), None)
        assert parent is not None, "a root is never pending"
        yield BlocksPlaced(hashes, parent.hash if parent.parent is not None else None, MEDIA[level])
