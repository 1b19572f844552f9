"""The table of tool-call formats. A model's format is the setting `tool-call-parser`, or seen in its chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.messages import ConfigError
from core.openai.events import TextParser
from core.openai.tool_calls.bare import BareCallParser
from core.openai.tool_calls.calls import CallWriter
from core.openai.tool_calls.tagged import TaggedCallParser


@dataclass(frozen=True)
class ToolCallFormat:
    """One way in which models write calls."""

    names: tuple[str, ...]
    """What the setting may say; the first is the proper one."""
    marks: tuple[str, ...]
    """A chat template that contains one of these is for this format."""
    make: Callable[[CallWriter], TextParser]
    """A parser for one answer."""
    special_tokens: frozenset[str] = frozenset()
    """Special tokens that the parser has to see in the text."""


FORMATS: list[ToolCallFormat] = []


def register(format_: ToolCallFormat) -> ToolCallFormat:
    """Adds a format; an earlier one of the same name is replaced. Later ones are detected first."""
    FORMATS[:] = [f for f in FORMATS if not set(f.names) & set(format_.names)]
    FORMATS.insert(0, format_)
    return format_


def by_name(name: str) -> ToolCallFormat:
    """The format of this name. Raises `ConfigError` with the known ones."""
    for format_ in FORMATS:
        if name in format_.names:
            return format_
    known = ", ".join(sorted(n for f in FORMATS for n in f.names))
    raise ConfigError(f"Unknown tool-call-parser '{name}'; known are {known}.")


def detect(template: str) -> ToolCallFormat | None:
    """The format that a chat template teaches its model."""
    return next((f for f in FORMATS if any(mark in template for mark in f.marks)), None)


register(
    ToolCallFormat(
        names=("llama3_json", "llama3", "llama4_json"),
        marks=("<|python_tag|>", '{"name": function name, "parameters":'),
        make=lambda calls: BareCallParser(calls, "<|python_tag|>", ";,"),
        special_tokens=frozenset({"<|python_tag|>"}),
    )
)
register(
    ToolCallFormat(
        names=("hermes", "qwen", "qwen25", "qwen3"),
        marks=("<tool_call>",),
        make=lambda calls: TaggedCallParser(calls, "<tool_call>", "</tool_call>"),
        special_tokens=frozenset({"<tool_call>", "</tool_call>"}),
    )
)
