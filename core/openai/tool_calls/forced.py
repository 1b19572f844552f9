"""Calls that a constraint forces: `tool_choice` names a function, or requires some."""

from __future__ import annotations

import secrets
from typing import Any

from core.openai.events import Content, Event, ToolArguments, ToolStart
from core.openai.protocol import Tool
from core.openai.tool_calls.calls import CallWriter
from core.openai.tool_calls.scanner import CallScanner


class NamedCallParser:
    """The whole answer is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = False

    def push(self, text: str) -> list[Event]:
        """See `TextParser`."""
        events: list[Event] = []
        if not self._started:
            self._started = True
            events.append(ToolStart(0, f"call_{secrets.token_hex(12)}", self._name))
        return [*events, ToolArguments(0, text)]

    def finish(self) -> list[Event]:
        """See `TextParser`."""
        return []


class ListedCallParser:
    """The whole answer is a JSON list of calls."""

    def __init__(self, calls: CallWriter) -> None:
        self._calls = calls
        self._scanner: CallScanner | None = None

    def push(self, text: str) -> list[Event]:
        """See `TextParser`."""
        events: list[Event] = []
        while text:
            if self._scanner is None:
                text = text.lstrip(" \t\r\n[,]")
                if not text:
                    break
                self._scanner = self._calls.open()
            scanner = self._scanner
            text = scanner.feed(text)
            if self._calls.refuses(scanner) and not self._calls.begun:
                self._scanner = None
                events.append(Content(scanner.raw))
                continue
            events += self._calls.progress(scanner)
            if scanner.done:
                self._scanner = None
                ending = self._calls.complete(scanner)
                events += [Content(scanner.raw)] if ending is None else ending
        return events

    def finish(self) -> list[Event]:
        """See `TextParser`."""
        scanner, self._scanner = self._scanner, None
        return [Content(scanner.raw)] if scanner is not None and not self._calls.begun else []


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """What the arguments of a function must satisfy."""
    return tool.function.parameters or {"type": "object", "properties": {}}


def list_schema(tools: list[Tool], *, most: int | None) -> dict[str, Any]:
    """What a list of at least one call must satisfy. `$defs` of the functions' schemas move to the top."""
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        parameters = dict(arguments_schema(tool))
        definitions.update(parameters.pop("$defs", {}))
        properties = {"name": {"type": "string", "enum": [tool.function.name]}, "parameters": parameters}
        call = {"type": "object", "properties": properties, "required": ["name", "parameters"]}
        calls.append({**call, "additionalProperties": False})  # else a model may write on behind its call
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if most is not None:
        schema["maxItems"] = most
    if definitions:
        schema["$defs"] = definitions
    return schema
