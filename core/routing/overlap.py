"""What a prefix lookup found."""

from __future__ import annotations

from collections.abc import Mapping

from core.kv import Target
from core.messages import Medium


class Overlap:
    """Leading blocks of one prompt that each target holds."""

    __slots__ = ("blocks", "slower")

    def __init__(self, blocks: dict[Target, int], slower: dict[Medium, dict[Target, int]]) -> None:
        self.blocks = blocks
        """Blocks that can be reused from any medium; targets that hold none are left out."""
        self.slower = slower
        """Of these, the blocks on media slower than the device, by medium; empty when everything is on the device."""

    def weighted(self, weights: Mapping[Medium, float]) -> Mapping[Target, float]:
        """Blocks as they count: one on a medium of weight 0.75 is worth three quarters of one on the device."""
        if not self.slower:
            return self.blocks
        counted: dict[Target, float] = dict(self.blocks)
        for medium, blocks in self.slower.items():
            loss = 1.0 - weights[medium]
            for target, number in blocks.items():
                counted[target] -= loss * number
        return counted


EMPTY = Overlap({}, {})
