"""Turns what a scanner reads into tool events, for all formats alike."""

from __future__ import annotations

import secrets

from core.openai.events import Event, ToolArguments, ToolStart
from core.openai.tool_calls.scanner import CallScanner


class CallWriter:
    """Counts an answer's calls and writes their events.

    Eager (streaming): a call begins when its name is complete, and its arguments follow as they come. Otherwise a call
    is written when it is complete and valid, so that a malformed one can still become text.
    """

    def __init__(self, tools: frozenset[str], *, eager: bool, limit: int | None) -> None:
        """`tools`: names that may be called. `limit`: most calls in an answer; further ones are left out."""
        self._tools = tools
        self._eager = eager
        self._limit = limit
        self._index = -1
        self.begun = False
        """The current call has been told to the client: it can no longer become text."""

    def open(self) -> CallScanner:
        """A scanner for the next call."""
        self.begun = False
        return CallScanner()

    def refuses(self, scanner: CallScanner) -> bool:
        """Whether what was read cannot be a call of this request's tools."""
        return scanner.failed or (scanner.name is not None and scanner.name not in self._tools)

    def progress(self, scanner: CallScanner) -> list[Event]:
        """Events for what was read since the last call. Only for a scanner that is not refused."""
        if not self._eager or scanner.name is None or self._full:
            return []
        events = [] if self.begun else [self._start(scanner.name)]
        text = scanner.take()
        return [*events, ToolArguments(self._index, text)] if text else events

    def complete(self, scanner: CallScanner) -> list[Event] | None:
        """Events for the end of a call; None when it has to become text."""
        if not self.begun and not self._full and (not scanner.valid or self.refuses(scanner)):
            return None
        if self._full and not self.begun:
            return []
        events: list[Event] = []
        if not self.begun:
            assert scanner.name is not None
            events.append(self._start(scanner.name))
        text = scanner.take()
        if not scanner.arguments:
            text = "{}"
        self.begun = False
        return [*events, ToolArguments(self._index, text)] if text else events

    @property
    def _full(self) -> bool:
        return not self.begun and self._limit is not None and self._index + 1 >= self._limit

    def _start(self, name: str) -> Event:
        self._index += 1
        self.begun = True
        return ToolStart(self._index, f"call_{secrets.token_hex(12)}", name)
