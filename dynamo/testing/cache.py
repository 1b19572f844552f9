"""A copy of an engine's prefix cache, kept from its events alone: what a router believes."""

from __future__ import annotations

from collections import Counter

from dynamo import EngineRequest, KvCleared, KvEventBatch, KvRemoved, KvStored

Key = tuple[int | None, tuple[int, ...], str | None, str | None]
"""Parent's hash, the block's tokens, LoRA, cache salt: what tells a block from every other."""


class CacheMirror:
    """Follows one engine's events. Raises `AssertionError` at the event that cannot be true."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.batches = 0
        self.removed = 0
        """Blocks that events have removed so far, clearing not counted."""
        self._copies: Counter[int] = Counter()
        self._keys: dict[int, Key] = {}
        self._blocks: dict[Key, set[int]] = {}

    def __len__(self) -> int:
        """Blocks that can be reused now, each copy counted."""
        return self._copies.total()

    def apply(self, batch: KvEventBatch) -> None:
        """Takes the next batch of rank 0; its number must follow the last one's."""
        assert batch.sequence == self.batches, (
            f"event batch {batch.sequence} came where {self.batches} was due: number batches from 0 without gaps"
        )
        self.batches += 1
        for event in batch.events:
            if isinstance(event, KvStored):
                self._store(event)
            elif isinstance(event, KvRemoved):
                self._remove(event)
            else:
                assert isinstance(event, KvCleared), f"unknown event {event!r}"
                self._copies.clear()
                self._keys.clear()
                self._blocks.clear()
        self.check_integrity()

    def reusable(self, request: EngineRequest) -> int:
        """Leading tokens of the prompt that the engine need not compute: whole blocks, and never the last token."""
        tokens, size = request.token_ids, self.block_size
        parents: set[int | None] = {None}
        for start in range(0, len(tokens) - 1 - (len(tokens) - 1) % size, size):
            block = tuple(tokens[start : start + size])
            found: set[int | None] = set()
            for parent in parents:
                found |= self._blocks.get((parent, block, request.lora, request.cache_salt), set())
            if not found:
                return start
            parents = found
        return (len(tokens) - 1) // size * size

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the three tables disagree."""
        held = {block for blocks in self._blocks.values() for block in blocks}
        assert set(self._copies) == set(self._keys) == held
        assert all(count > 0 for count in self._copies.values())

    def _store(self, event: KvStored) -> None:
        size, count = event.block_size, len(event.block_hashes)
        assert size == self.block_size, f"blocks of {size} tokens were stored, EngineInfo says {self.block_size}"
        assert len(event.token_ids) == count * size, (
            f"{count} blocks of {size} tokens were stored with {len(event.token_ids)} token ids"
        )
        parent = event.parent_hash
        for index, block in enumerate(event.block_hashes):
            key = (parent, tuple(event.token_ids[index * size : (index + 1) * size]), event.lora, event.cache_salt)
            known = self._keys.setdefault(block, key)
            assert known == key, f"hash {block} names two different blocks: {known} and {key}"
            self._copies[block] += 1
            self._blocks.setdefault(key, set()).add(block)
            parent = block

    def _remove(self, event: KvRemoved) -> None:
        for block in event.block_hashes:
            assert self._copies[block] > 0, f"block {block} was removed and is not stored (any more)"
            self._copies[block] -= 1
            self.removed += 1
            if not self._copies[block]:
                del self._copies[block]
                key = self._keys.pop(block)
                self._blocks[key].discard(block)
                if not self._blocks[key]:
                    del self._blocks[key]
