"""Decides how the text of an answer is parsed: which tool-call format, whether there is reasoning, what is forced."""

from __future__ import annotations

import msgspec

from core.messages import ConfigError, Constraint, ConstraintKind, RequestRejected
from core.openai import sampling
from core.openai.card import ModelCard
from core.openai.events import TextParser
from core.openai.protocol import ChatRequest, NamedToolChoice, Tool
from core.openai.reasoning import CLOSING, OPENING, ThinkParser, opened_by
from core.openai.settings import PipelineSettings
from core.openai.template import ChatTemplate
from core.openai.tool_calls.calls import CallWriter
from core.openai.tool_calls.forced import ListedCallParser, NamedCallParser, arguments_schema, list_schema
from core.openai.tool_calls.formats import FORMATS, ToolCallFormat, by_name, detect


class ParserFactory:
    """What a model's answers look like. Raises `ConfigError` for settings that name no known format."""

    def __init__(self, card: ModelCard, template: ChatTemplate | None, settings: PipelineSettings) -> None:
        source = template.source if template is not None else ""
        named = settings.tool_call_parser
        self._format: ToolCallFormat | None = by_name(named) if named is not None else detect(source)
        reasoning = settings.reasoning_parser
        if reasoning not in (None, "think", "none"):
            raise ConfigError(f"Unknown reasoning-parser '{reasoning}'; known are think and none.")
        self._reasons = reasoning == "think" or (reasoning is None and (OPENING in source or CLOSING in source))
        self._card = card

    @property
    def special_tokens(self) -> frozenset[str]:
        """Special tokens that have to stay in the text."""
        tags = frozenset({OPENING, CLOSING}) if self._reasons else frozenset()
        return tags | (self._format.special_tokens if self._format is not None else frozenset())

    def check(self, request: ChatRequest) -> tuple[Tool | None, bool]:
        """The function that must be called, and whether some must. Raises `RequestRejected` for what cannot be done."""
        if request.functions is not None or request.function_call is not None:
            raise RequestRejected(
                "'functions' and 'function_call' were retired by OpenAI; send 'tools' and 'tool_choice'.",
                param="functions" if request.functions is not None else "function_call",
            )
        tools = request.tools or []
        choice = request.tool_choice
        if not tools:
            if choice == "required" or isinstance(choice, NamedToolChoice):
                raise RequestRejected(
                    "'tool_choice' asks for a call, but 'tools' is empty; list the tools.", param="tools"
                )
            return None, False
        if isinstance(choice, NamedToolChoice):
            for tool in tools:
                if tool.function.name == choice.function.name:
                    sampling.require(ConstraintKind.JSON_SCHEMA, self._card, "tool_choice")
                    return tool, False
            names = ", ".join(t.function.name for t in tools)
            raise RequestRejected(
                f"'tool_choice' names the function {choice.function.name[:64]!r}; 'tools' has {names}.",
                param="tool_choice.function.name",
            )
        if choice == "required":
            sampling.require(ConstraintKind.JSON_SCHEMA, self._card, "tool_choice")
            return None, True
        if choice != "none" and self._format is None:
            known = ", ".join(sorted(f.names[0] for f in FORMATS))
            raise RequestRejected(
                "This model's chat template shows no known format of tool calls; leave out 'tools', set 'tool_choice' "
                f"to 'required', or serve the model with the setting tool-call-parser ({known}).",
                param="tools",
                code="tools_unsupported",
            )
        return None, False

    def constraint(self, request: ChatRequest, named: Tool | None, required: bool) -> Constraint | None:
        """The language of the answer that `tool_choice` or the request's own constraint asks for."""
        own = sampling.constraint(request, self._card)
        if named is None and not required:
            return own
        if own is not None:
            raise RequestRejected(
                "'tool_choice' and the structured output both fix the form of the answer; keep one of them.",
                param="tool_choice",
            )
        if named is not None:
            schema = arguments_schema(named)
        else:
            most = 1 if request.parallel_tool_calls is False else None
            schema = list_schema(request.tools or [], most=most)
        return Constraint(ConstraintKind.JSON_SCHEMA, msgspec.json.encode(schema).decode())

    def parser(
        self, request: ChatRequest, prompt: str | None, named: Tool | None, required: bool, *, constrained: bool
    ) -> TextParser | None:
        """The parser of one choice's text; None when the text is the answer. A constrained text has no reasoning."""
        if named is not None:
            return NamedCallParser(named.function.name)
        calls: TextParser | None = None
        if request.tools and request.tool_choice != "none":
            limit = 1 if request.parallel_tool_calls is False else None
            names = frozenset(t.function.name for t in request.tools)
            writer = CallWriter(names, eager=bool(request.stream), limit=limit)
            if required:
                return ListedCallParser(writer)
            assert self._format is not None
            calls = self._format.make(writer)
        if self._reasons and not constrained and not request.continue_final_message:
            return ThinkParser(inside=opened_by(prompt), shown=request.include_reasoning is not False, then=calls)
        return calls
