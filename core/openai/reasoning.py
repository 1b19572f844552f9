"""Splits the model's reasoning, between `<think>` and `</think>`, from its answer."""

from __future__ import annotations

from core.openai.events import Content, Event, Reasoning, TextParser

OPENING = "<think>"
CLOSING = "</think>"


class ThinkParser:
    """Reasoning comes first, if at all: a tag inside the answer is text. What follows it goes to `then`."""

    def __init__(self, *, inside: bool, shown: bool, then: TextParser | None) -> None:
        """`inside`: the prompt ended with the opening tag. `shown` false leaves the reasoning out."""
        self._inside = inside
        self._after = False
        self._shown = shown
        self._then = then
        self._held = ""
        self._bare = True

    def push(self, text: str) -> list[Event]:
        """See `TextParser`."""
        if self._after and not self._bare:
            return self._answer(text)
        events: list[Event] = []
        self._held += text
        if not self._inside and not self._after:
            start = self._held.lstrip()
            if start.startswith(OPENING):
                self._inside, self._held = True, start[len(OPENING) :]
            elif OPENING.startswith(start):
                return []
            else:
                self._after, self._bare = True, False
                return self._answer(self._take())
        if self._inside:
            events += self._reasoning()
        if self._after:
            self._held = self._held.lstrip("\r\n")  # the blank line after the tag belongs to neither
            if self._held:
                self._bare = False
                events += self._answer(self._take())
        return events

    def finish(self) -> list[Event]:
        """See `TextParser`."""
        held = self._take()
        if self._inside:
            events = self._thought(held.rstrip())
        else:
            events = self._answer(held) if held and not self._after else []
        return events + (self._then.finish() if self._then is not None else [])

    def _reasoning(self) -> list[Event]:
        if self._bare:
            self._held = self._held.lstrip("\r\n")
        place = self._held.find(CLOSING)
        if place >= 0:
            text, self._held = self._held[:place].rstrip(), self._held[place + len(CLOSING) :]
            self._inside, self._after, self._bare = False, True, True
            return self._thought(text)
        shown = len(self._held)
        for size in range(min(len(self._held), len(CLOSING) - 1), 0, -1):
            if self._held.endswith(CLOSING[:size]):
                shown -= size
                break
        shown = len(self._held[:shown].rstrip())
        text, self._held = self._held[:shown], self._held[shown:]
        if text:
            self._bare = False
        return self._thought(text)

    def _thought(self, text: str) -> list[Event]:
        return [Reasoning(text)] if text and self._shown else []

    def _answer(self, text: str) -> list[Event]:
        if not text:
            return []
        return self._then.push(text) if self._then is not None else [Content(text)]

    def _take(self) -> str:
        held, self._held = self._held, ""
        return held


def opened_by(prompt: str | None) -> bool:
    """Whether the prompt ends inside a reasoning section."""
    return prompt is not None and prompt[-32:].rstrip().endswith(OPENING)
