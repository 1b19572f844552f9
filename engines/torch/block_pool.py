"""KV blocks: who holds them, which of them can be reused for a prefix, and which goes first when room is needed.

A block is held (reference count above zero) by the sequences that read or write it, or free. Free blocks wait in the
order in which they will be taken; those with known content keep it, and stay reusable, until they are. Content is
identified by a chained digest: 128 bits of BLAKE2b over the parent's digest and the block's tokens, with the cache salt
and the LoRA name at the root, so that equal digests mean equal prefixes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Tokens

from core.messages import KvCleared, KvEvent, KvRemoved, KvStored

_DIGEST_SIZE = 16


class Content:
    """What a cached block holds. `key` is its id in KV events."""

    __slots__ = ("children", "digest", "parent", "root", "tokens")

    def __init__(
        self, digest: bytes, parent: Content | None, root: tuple[str | None, str | None], tokens: bytes
    ) -> None:
        self.digest = digest
        self.parent = parent
        self.root = root
        self.tokens = tokens
        self.children = 0

    @property
    def key(self) -> int:
        """The block's hash in events: 64 bits of the digest, because the wire has no wider integers."""
        return int.from_bytes(self.digest[:8], "little")


def root_digest(cache_salt: str | None, lora: str | None) -> bytes:
    """Start of a chain. Prefixes are shared only within the same salt and LoRA."""
    return hashlib.blake2b(repr((cache_salt, lora)).encode(), digest_size=_DIGEST_SIZE).digest()


class BlockPool:
    """Reference counts, prefix index and eviction order of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        """`caching`: whether full blocks are kept for reuse."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._caching = caching
        self._refs = [0] * num_blocks
        self._content: list[Content | None] = [None] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._index: dict[bytes, int] = {}
        self.events: list[KvEvent] = []
        """What became and ceased to be reusable since the list was last taken."""

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those kept for reuse included."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - len(self._free)

    def match(self, tokens: Tokens[int], cache_salt: str | None, lora: str | None) -> list[int]:
        """Blocks of the longest cached prefix of `tokens`, in order. At least one token is left to compute.

        Nothing is held yet: call `acquire` before anything else is allocated.
        """
        found: list[int] = []
        if not self._caching:
            return found
        size = self.block_size
        digest = root_digest(cache_salt, lora)
        for start in range(0, len(tokens) - size, size):
            digest = _chain(digest, _pack(tokens[start : start + size]))
            block = self._index.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def count_free(self, blocks: list[int]) -> int:
        """How many of `blocks` are free now, and would cease to be by `acquire`."""
        return sum(1 for block in blocks if self._refs[block] == 0)

    def acquire(self, blocks: list[int]) -> None:
        """Holds cached blocks once more."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, evicting what they cache. Pre: `count <= num_free`."""
        assert count <= len(self._free), (count, len(self._free))
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._evict(block)
            self._refs[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Tokens[int]) -> None:
        """Lets go of a sequence's blocks, given in order. The tail becomes free first, and so is evicted first."""
        for block in reversed(blocks):
            refs = self._refs[block] = self._refs[block] - 1
            assert refs >= 0, f"block {block} was released more often than it was held"
            if refs == 0:
                self._free[block] = None
                if self._content[block] is None:
                    self._free.move_to_end(block, last=False)

    def digest_of(self, block: int) -> bytes | None:
        """Digest of a cached block; None when the block is not in the index."""
        content = self._content[block]
        return content.digest if content else None

    def store(
        self,
        table: array[int],
        first: int,
        tokens: Tokens[int],
        chain: bytes | None,
        cache_salt: str | None,
        lora: str | None,
    ) -> bytes | None:
        """Makes the full blocks `table[first:]` that `tokens` fill reusable, and returns the digest of the last one.

        `chain` is the digest of block `first - 1` (None when `first` is 0). Where the same content is cached already,
        the table is changed to that block and its own one is let go, so that a content exists once, and whoever holds
        a block holds the blocks before it: a cached block's parent is always cached.
        """
        if not self._caching:
            return None
        root = (cache_salt, lora)
        digest = chain if chain is not None else root_digest(cache_salt, lora)
        parent = self._content[table[first - 1]] if first else None
        stored: list[Content] = []
        for position in range(first, first + len(tokens) // self.block_size):
            start = (position - first) * self.block_size
            packed = _pack(tokens[start : start + self.block_size])
            digest = _chain(digest, packed)
            block = table[position]
            known = self._index.get(digest)
            if known is not None:
                if known != block:
                    self.acquire([known])
                    table[position] = known
                    self.release([block])
                parent = self._content[known]
                self._announce(stored)
                continue
            content = Content(digest, parent, root, packed)
            if parent is not None:
                parent.children += 1
            self._index[digest] = block
            self._content[block] = content
            stored.append(content)
            parent = content
        self._announce(stored)
        return digest

    def snapshot(self) -> list[KvEvent]:
        """Events that describe the cache as it is to somebody who knows nothing of it."""
        chains: list[list[Content]] = []
        for content in self._in_chain_order():
            if chains and content.parent is chains[-1][-1]:
                chains[-1].append(content)
            else:
                chains.append([content])
        return [KvCleared(), *(self._stored(chain) for chain in chains)]

    def take_events(self) -> list[KvEvent]:
        """The events since the last call, in order."""
        events, self.events = self.events, []
        return events

    def check_integrity(self, tables: Tokens[Tokens[int]] = ()) -> None:
        """Asserts the pool's invariants. `tables` are the block tables of every sequence that holds blocks."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        assert held == self._refs, "reference counts differ from the block tables: a block leaked or is used twice"
        for block, refs in enumerate(self._refs):
            assert (block in self._free) == (refs == 0), f"block {block}: {refs} references, free list disagrees"
        cached = {block: content for block, content in enumerate(self._content) if content is not None}
        assert {content.digest: block for block, content in cached.items()} == self._index, (
            "prefix index is out of step"
        )
        children: dict[bytes, int] = {}
        for block, content in cached.items():
            if content.parent is not None:
                assert content.parent.digest in self._index, f"block {block} is cached without its parent"
                children[content.parent.digest] = children.get(content.parent.digest, 0) + 1
        for content in cached.values():
            assert content.children == children.get(content.digest, 0), "child counts are out of step"

    def _evict(self, block: int) -> None:
        content = self._content[block]
        if content is None:
            return
        assert content.children == 0, f"block {block} would be evicted before the blocks that follow it"
        if content.parent is not None:
            content.parent.children -= 1
        del self._index[content.digest]
        self._content[block] = None
        last = self.events[-1] if self.events else None
        if isinstance(last, KvRemoved):
            last.block_hashes.append(content.key)
        else:
            self.events.append(KvRemoved(block_hashes=[content.key]))

    def _announce(self, stored: list[Content]) -> None:
        if stored:
            self.events.append(self._stored(stored))
            stored.clear()

    def _stored(self, contents: list[Content]) -> KvStored:
        salt, lora = contents[0].root
        parent = contents[0].parent
        return KvStored(
            block_hashes=[content.key for content in contents],
            parent_hash=parent.key if parent else None,
            token_ids=array("i", b"".join(content.tokens for content in contents)).tolist(),
            block_size=self.block_size,
            lora=lora,
            cache_salt=salt,
        )

    def _in_chain_order(self) -> list[Content]:
        order: dict[bytes, Content] = {}
        for block in self._index.values():
            pending = []
            content = self._content[block]
            while content is not None and content.digest not in order:
                pending.append(content)
                content = content.parent
            for content in reversed(pending):
                order[content.digest] = content
        return list(order.values())


def _pack(tokens: Tokens[int]) -> bytes:
    return array("i", tokens).tobytes()


def _chain(parent: bytes, tokens: bytes) -> bytes:
    return hashlib.blake2b(tokens, digest_size=_DIGEST_SIZE, key=parent).digest()
