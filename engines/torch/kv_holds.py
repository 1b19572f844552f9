"""Blocks that KV sessions and transfers hold: pinned beside those of running sequences, and never evicted."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Blocks

from core.messages import EngineRequest
from engines.torch.block_pool import BlockPool


class Hold:
    """One session's blocks, in token order."""

    __slots__ = ("chain", "num_hashed", "num_tokens", "table")

    def __init__(self, table: array[int], num_tokens: int, num_hashed: int = 0, chain: bytes | None = None) -> None:
        self.table = table
        self.num_tokens = num_tokens
        """Leading tokens whose KV is in the blocks."""
        self.num_hashed = num_hashed
        """Leading blocks that are in the prefix cache."""
        self.chain = chain
        """Digest of the last of those."""


class Holds:
    """The holds by name. Not thread-safe: the engine thread owns it."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._holds: dict[str, Hold] = {}

    def __len__(self) -> int:
        return len(self._holds)

    @property
    def tables(self) -> list[array[int]]:
        """The blocks of every hold."""
        return [hold.table for hold in self._holds.values()]

    def keep(self, name: str, hold: Hold) -> None:
        """Takes over blocks that are held already. Pre: the name is new."""
        assert name not in self._holds, f"KV session '{name}' exists already"
        self._holds[name] = hold

    def pin(self, name: str, blocks: list[int]) -> None:
        """Holds blocks once more, under a name of their own, until `free`."""
        table = array("q", blocks)
        self._pool.acquire(blocks)
        self.keep(name, Hold(table, 0))

    def reserve(self, name: str, request: EngineRequest) -> tuple[list[int], int] | None:
        """Holds room for the request's prompt: its blocks, and how many of them, at the beginning, are filled already.

        None, and nothing is held, when there is no room.
        """
        pool, tokens = self._pool, request.token_ids
        cached = pool.match(tokens, request.cache_salt, request.lora)
        missing = -(-len(tokens) // pool.block_size) - len(cached)
        if missing > pool.num_free - pool.count_free(cached):
            return None
        pool.acquire(cached)
        table = array("q", cached)
        table.extend(pool.allocate(missing))
        chain = pool.digest_of(cached[-1]) if cached else None
        self.keep(name, Hold(table, len(cached) * pool.block_size, len(cached), chain))
        return table.tolist(), len(cached)

    def fill(self, name: str, request: EngineRequest, num_tokens: int) -> bool:
        """Records that the KV of the prompt's first `num_tokens` tokens is in a hold's blocks, and makes those that
        are full reusable, as if they had been computed here. False when the hold was freed meanwhile.
        """
        hold = self._holds.get(name)
        if hold is None:
            return False
        size = self._pool.block_size
        full = num_tokens // size
        tokens = request.token_ids[hold.num_hashed * size : full * size]
        hold.chain = self._pool.store(hold.table, hold.num_hashed, tokens, hold.chain, request.cache_salt, request.lora)
        hold.num_hashed, hold.num_tokens = full, num_tokens
        return True

    def take(self, name: str) -> Hold:
        """The hold, whose blocks are the caller's from now on. Pre: it exists."""
        return self._holds.pop(name)

    def free(self, name: str, blocks: Blocks[int] | None = None) -> None:
        """Lets go of a hold, or of some of its blocks. Nothing happens when there is no such hold."""
        hold = self._holds.get(name)
        if hold is None:
            return
        if blocks is None or len(blocks) == len(hold.table):
            del self._holds[name]
            self._pool.release(hold.table)
            return
        freed = set(blocks)
        gone = [block for block in hold.table if block in freed]
        assert len(gone) == len(blocks), f"KV session '{name}' does not hold all of {list(blocks)}"
        hold.table = array("q", [block for block in hold.table if block not in freed])
        self._pool.release(gone)
