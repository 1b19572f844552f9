"""Puts numbered messages back in order and knows what is missing."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Sequencer(Generic[T]):
    """Messages in any order in, messages in order out, each once."""

    def __init__(self, start: int = 0) -> None:
        self.next = start
        """Number of the next message to hand out."""
        self.duplicates = 0
        """Messages that had been handed out, or were held, already."""
        self._held: dict[int, T] = {}

    def __len__(self) -> int:
        """Messages that wait for an earlier one."""
        return len(self._held)

    def offer(self, number: int, message: T) -> list[T]:
        """Takes one message; gives those that are now in order, possibly none."""
        if number < self.next or number in self._held:
            self.duplicates += 1
            return []
        if number > self.next:
            self._held[number] = message
            return []
        self.next += 1
        return [message, *self._drain()]

    def skip_to(self, number: int) -> list[T]:
        """Counts everything before `number` as had; gives what is in order from there. Never goes back."""
        self.next = max(self.next, number)
        for held in [n for n in self._held if n < self.next]:
            del self._held[held]
        return self._drain()

    def skip_gap(self) -> list[T]:
        """Gives up on what is missing before the earliest held message. Nothing when nothing is held."""
        return self.skip_to(min(self._held)) if self._held else []

    def drop_held(self) -> None:
        """Forgets what waits; its numbers can be offered again."""
        self._held.clear()

    def _drain(self) -> list[T]:
        ready = []
        while self.next in self._held:
            ready.append(self._held.pop(self.next))
            self.next += 1
        return ready

    def check_integrity(self) -> None:
        """Raises `AssertionError` when a held message could have been handed out."""
        assert all(number > self.next for number in self._held), f"{min(self._held)} is held, {self.next} is next"
