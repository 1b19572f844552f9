"""Calls as bare JSON, as Llama 3 models write them: the whole answer is `{"name": ..., "parameters": {...}}`, several
are separated by semicolons, and `<|python_tag|>` may come first.
"""

from __future__ import annotations

from core.openai.events import Content, Event
from core.openai.tool_calls.calls import CallWriter
from core.openai.tool_calls.scanner import CallScanner


class BareCallParser:
    """An answer that does not begin as a call is content throughout; so is JSON that is no call."""

    def __init__(self, calls: CallWriter, opening: str, separators: str) -> None:
        self._calls = calls
        self._opening = opening
        self._separators = separators
        self._held = ""
        self._scanner: CallScanner | None = None
        self._text = False
        self._called = False

    def push(self, text: str) -> list[Event]:
        """See `TextParser`."""
        if self._text:
            return [Content(text)] if text else []
        events: list[Event] = []
        self._held += text
        while self._held and not self._text:
            before = (self._scanner, len(self._held))
            events += self._between() if self._scanner is None else self._inside(self._scanner)
            if (self._scanner, len(self._held)) == before:
                break
        return events

    def finish(self) -> list[Event]:
        """See `TextParser`."""
        scanner, held = self._scanner, self._held
        self._scanner, self._held = None, ""
        if scanner is not None and not self._calls.begun:
            return [Content(scanner.raw + held)]
        return [Content(held)] if held.strip() and not self._called else []

    def _between(self) -> list[Event]:
        start = self._held.lstrip(self._separators + " \t\r\n" if self._called else " \t\r\n")
        if start.startswith(self._opening):
            self._held = start[len(self._opening) :]
            return []
        if start.startswith("{"):
            self._held = start
            self._scanner = self._calls.open()
            return []
        if self._opening.startswith(start):
            return []
        return self._become_text(start if self._called else self._held)

    def _inside(self, scanner: CallScanner) -> list[Event]:
        text, self._held = self._held, ""
        self._held = scanner.feed(text)
        if self._calls.begun and scanner.failed:
            self._scanner = None
            return self._become_text("")
        if self._calls.refuses(scanner) and not self._calls.begun:
            return self._become_text(scanner.raw + self._held)
        events = self._calls.progress(scanner)
        if not scanner.done:
            return events
        ending = self._calls.complete(scanner)
        if ending is None:
            return events + self._become_text(scanner.raw + self._held)
        self._scanner = None
        self._called = True
        return events + ending

    def _become_text(self, text: str) -> list[Event]:
        self._scanner, self._held, self._text = None, "", True
        return [Content(text)] if text else []
