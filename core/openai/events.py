"""What a parser finds in the model's text."""

from __future__ import annotations

from typing import Protocol

import msgspec


class Content(msgspec.Struct, frozen=True, gc=False):
    """Text of the answer."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """Text of the model's reasoning."""

    text: str


class ToolStart(msgspec.Struct, frozen=True, gc=False):
    """A call begins. `index` counts the calls of one answer from 0."""

    index: int
    id: str
    name: str


class ToolArguments(msgspec.Struct, frozen=True, gc=False):
    """More of a call's arguments: the pieces together are JSON text."""

    index: int
    text: str


Event = Content | Reasoning | ToolStart | ToolArguments


class TextParser(Protocol):
    """Splits one answer's text, which comes in pieces, into events."""

    def push(self, text: str) -> list[Event]:
        """What became certain with this piece."""

    def finish(self) -> list[Event]:
        """What is left at the end of the text."""
