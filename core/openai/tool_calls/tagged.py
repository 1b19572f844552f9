"""Calls between tags, as Hermes and Qwen write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from core.openai.events import Content, Event
from core.openai.tool_calls.calls import CallWriter
from core.openai.tool_calls.scanner import CallScanner


class TaggedCallParser:
    """Text outside the tags is content, without the space around calls. A malformed call is content too."""

    def __init__(self, calls: CallWriter, opening: str, closing: str) -> None:
        self._calls = calls
        self._opening = opening
        self._closing = closing
        self._held = ""
        self._gap = ""
        self._scanner: CallScanner | None = None
        self._after_call = False

    def push(self, text: str) -> list[Event]:
        """See `TextParser`."""
        events: list[Event] = []
        self._held += text
        while self._held:
            before = (self._scanner, len(self._held))
            events += self._outside() if self._scanner is None else self._inside(self._scanner)
            if (self._scanner, len(self._held)) == before:
                break
        return events

    def finish(self) -> list[Event]:
        """See `TextParser`."""
        scanner, held = self._scanner, self._held
        self._scanner, self._held = None, ""
        if scanner is None:
            return [] if self._after_call and not held.strip() else _content(held)
        if scanner.done and (events := self._calls.complete(scanner)) is not None:
            return events + _content(held.strip())
        return [] if self._calls.begun else _content(self._gap + self._opening + scanner.raw + held)

    def _outside(self) -> list[Event]:
        if self._after_call:  # the space between calls is no content, nor is the closing tag
            self._held = self._held.lstrip()
            if self._held.startswith(self._closing):
                self._held = self._held[len(self._closing) :]
                return []
            if self._closing.startswith(self._held):
                return []
        place = self._held.find(self._opening)
        if place >= 0:
            text = self._held[:place].rstrip()
            self._gap = self._held[len(text) : place]
            self._held = self._held[place + len(self._opening) :]
            self._scanner = self._calls.open()
            self._after_call = False
            return _content(text)
        shown = len(self._held) - _overlap(self._held, self._opening)
        shown = len(self._held[:shown].rstrip())  # space before a call is only known to be content when more follows
        text, self._held = self._held[:shown], self._held[shown:]
        if text:
            self._after_call = False
        return _content(text)

    def _inside(self, scanner: CallScanner) -> list[Event]:
        text, self._held = self._held, ""
        self._held = scanner.feed(text)
        if self._calls.refuses(scanner) and not self._calls.begun:
            self._scanner = None
            return _content(self._gap + self._opening + scanner.raw)
        events = self._calls.progress(scanner) if not scanner.failed else []
        if scanner.failed:
            self._scanner = None
            return events
        if not scanner.done:
            return events
        ending = self._calls.complete(scanner)
        self._scanner = None
        if ending is None:
            return [*events, *_content(self._gap + self._opening + scanner.raw)]
        self._after_call = True
        return events + ending


def _content(text: str) -> list[Event]:
    return [Content(text)] if text else []


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    for size in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0
