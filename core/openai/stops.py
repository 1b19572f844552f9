"""Finds stop strings in text that comes in pieces, and withholds no more than could become one."""

from __future__ import annotations


class StopMatcher:
    """Cuts one sequence's text at the first stop string.

    The outcome does not depend on how the text is split: the stop string that is complete first ends the text; of
    several complete at the same character, the longest. Linear in the text whatever the strings are (a
    Knuth-Morris-Pratt automaton each).
    """

    __slots__ = ("_failures", "_first", "_held", "_include", "_states", "_stops", "matched")

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        """`include` leaves the stop string in the text."""
        self._stops = stops
        self._include = include
        self._first = frozenset(stop[0] for stop in stops)
        self._failures = [_failure(stop) for stop in stops]
        self._states = [0] * len(stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found; nothing may be pushed after it."""

    def push(self, text: str) -> str:
        """The text that can be shown now. Sets `matched` when a stop string is complete."""
        if not self._held and self._first.isdisjoint(text):
            return text
        buffer = self._held + text
        end = len(self._held)
        for char in text:
            end += 1
            self._advance(char)
            if self.matched is not None:
                self._held = ""
                return buffer[: end if self._include else end - len(self.matched)]
        kept = len(buffer) - max(self._states)
        self._held = buffer[kept:]
        return buffer[:kept]

    def flush(self) -> str:
        """The withheld text, at the end of a sequence without a stop string."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> None:
        for i, stop in enumerate(self._stops):
            failure = self._failures[i]
            state = self._states[i]
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                if self.matched is None or len(stop) > len(self.matched):
                    self.matched = stop
                state = failure[state - 1]
            self._states[i] = state


def _failure(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return table
