"""What a perfect router could reuse: one cache, as large as all workers' together or infinite."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from core.kv import prompt_hashes


class OneCache:
    """Prefix blocks in one place, least recently used first; deeper blocks of a prompt go before those above them."""

    def __init__(self, capacity: int | None, block_size: int) -> None:
        """`capacity` in blocks; None holds everything."""
        self._capacity = capacity
        self._block_size = block_size
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def reuse(self, prompt: list[int], sequence: list[int]) -> int:
        """Tokens of the prompt that need not be computed; then the whole `sequence` (prompt and answer) is cached."""
        hashes = prompt_hashes(prompt, self._block_size)
        held = next((n for n, block in enumerate(hashes) if block not in self._blocks), len(hashes))
        for block in reversed(prompt_hashes(sequence, self._block_size)):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while self._capacity is not None and len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        # An engine computes at least the last token of a prompt, for its logits.
        full = (len(prompt) - 1) // self._block_size
        return min(held, full) * self._block_size


def reuse_bound(served: Iterable[tuple[list[int], list[int]]], *, capacity: int | None, block_size: int) -> float:
    """Part of all prompt tokens that one cache would reuse; `served`: (prompt, whole sequence) in order of arrival."""
    cache = OneCache(capacity, block_size)
    hit = total = 0
    for prompt, sequence in served:
        hit += cache.reuse(prompt, sequence)
        total += len(prompt)
    return hit / total
