"""Writes choices as OpenAI's chunks (bytes for the socket) or collects them for one JSON body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from core.openai.events import Content, Event, Reasoning, ToolArguments, ToolStart
from core.openai.logprobs import Entry, LogprobFormat
from core.openai.responses import (
    AssistantMessage,
    ChatChoice,
    CompletionChoice,
    Function,
    ToolCall,
    Usage,
)

encode = msgspec.json.encode

DONE = b"data: [DONE]\n\n"


class StreamHead:
    """What all chunks of one streamed answer share."""

    def __init__(self, kind: str, id_: str, created: int, model: str, fingerprint: str, *, null_usage: bool) -> None:
        """`null_usage`: a usage chunk will follow, so the others say `"usage":null`, as OpenAI's do."""
        common = {"id": id_, "object": kind, "created": created, "model": model, "system_fingerprint": fingerprint}
        self.open = b"data: " + encode(common)[:-1] + b',"choices":['
        self.close = b'],"usage":null}\n\n' if null_usage else b"]}\n\n"

    def usage(self, usage: Usage) -> bytes:
        """The chunk that carries the usage."""
        return self.open + b'],"usage":' + encode(usage) + b"}\n\n"


class _Chunks:
    """The tail of a chunk, which with `continuous_usage_stats` has the usage so far."""

    def __init__(self, head: StreamHead, index: int, usage_of: Callable[[int], Usage] | None) -> None:
        self._head = head
        self._index = encode(index)
        self._usage_of = usage_of

    def _close(self, tokens: int) -> bytes:
        if self._usage_of is None:
            return self._head.close
        return b'],"usage":' + encode(self._usage_of(tokens)) + b"}\n\n"


class ChatChunks(_Chunks):
    """Streams one choice of a chat. The first chunk of a choice says the role."""

    def __init__(
        self,
        head: StreamHead,
        index: int,
        logprobs: LogprobFormat | None,
        usage_of: Callable[[int], Usage] | None = None,
    ) -> None:
        super().__init__(head, index, usage_of)
        self._logprobs = logprobs
        self._delta = head.open + b'{"index":' + self._index + b',"delta":{'
        self._role = b'"role":"assistant",'
        self._text = self._delta + self._role + b'"content":'
        self._text_end = b'},"logprobs":null,"finish_reason":null}' + head.close

    def text(self, text: str) -> bytes:
        """See `ChoiceWriter`."""
        data = self._text + encode(text) + self._text_end
        if self._role:
            self._role = b""
            self._text = self._delta + b'"content":'
        return data

    def events(self, events: list[Event], logprobs: list[Entry], tokens: int) -> bytes:
        """See `ChoiceWriter`."""
        spelled = b"null"
        if logprobs and self._logprobs is not None:
            spelled = encode(self._logprobs.chat(logprobs))
            if not events:
                events = [Content("")]
        data = b""
        for event in events:
            role, self._role = self._role, b""
            ending = b'},"logprobs":' + spelled + b',"finish_reason":null}' + self._close(tokens)
            data += self._delta + role + _fields(event) + ending
            spelled = b"null"
        self._text = self._delta + self._role + b'"content":'
        return data

    def finish(self, reason: str, tokens: int) -> bytes:
        """See `ChoiceWriter`."""
        role, self._role = self._role, b""
        fields = role + b'"content":""' if role else b""
        end = b'},"logprobs":null,"finish_reason":' + encode(reason) + b"}" + self._close(tokens)
        return self._delta + fields + end


def _fields(event: Event) -> bytes:
    match event:
        case Content(text):
            return b'"content":' + encode(text)
        case Reasoning(text):
            return b'"reasoning_content":' + encode(text)
        case ToolStart(index, id_, name):
            function = {"name": name, "arguments": ""}
            call: dict[str, Any] = {"index": index, "id": id_, "type": "function", "function": function}
            return b'"tool_calls":' + encode([call])
        case ToolArguments(index, text):
            return b'"tool_calls":' + encode([{"index": index, "function": {"arguments": text}}])


class CompletionChunks(_Chunks):
    """Streams one choice of a completion."""

    def __init__(
        self,
        head: StreamHead,
        index: int,
        logprobs: LogprobFormat | None,
        usage_of: Callable[[int], Usage] | None = None,
    ) -> None:
        super().__init__(head, index, usage_of)
        self._logprobs = logprobs
        self._text = head.open + b'{"index":' + self._index + b',"text":'
        self._text_end = b',"logprobs":null,"finish_reason":null}' + head.close

    def text(self, text: str) -> bytes:
        """See `ChoiceWriter`."""
        return self._text + encode(text) + self._text_end

    def events(self, events: list[Event], logprobs: list[Entry], tokens: int) -> bytes:
        """See `ChoiceWriter`."""
        text = "".join(e.text for e in events if isinstance(e, Content))
        shape = self._logprobs.completion(logprobs) if logprobs and self._logprobs is not None else None
        end = b',"logprobs":' + encode(shape) + b',"finish_reason":null}' + self._close(tokens)
        return self._text + encode(text) + end

    def finish(self, reason: str, tokens: int) -> bytes:
        """See `ChoiceWriter`."""
        end = b',"logprobs":null,"finish_reason":' + encode(reason) + b"}" + self._close(tokens)
        return self._text + b'""' + end


class _Collector:
    def __init__(self, index: int, logprobs: LogprobFormat | None) -> None:
        self._index = index
        self._format = logprobs
        self._logprobs: list[Entry] = []
        self._events: list[Event] = []
        self._reason = "stop"

    def text(self, text: str) -> bytes:
        """See `ChoiceWriter`."""
        self._events.append(Content(text))
        return b""

    def events(self, events: list[Event], logprobs: list[Entry], tokens: int) -> bytes:
        """See `ChoiceWriter`."""
        self._events += events
        self._logprobs += logprobs
        return b""

    def finish(self, reason: str, tokens: int) -> bytes:
        """See `ChoiceWriter`."""
        self._reason = reason
        return b""


class ChatCollector(_Collector):
    """Collects one choice of a chat."""

    def choice(self) -> ChatChoice:
        """The complete choice. `content` is null when there are tool calls and no text."""
        content = "".join(e.text for e in self._events if isinstance(e, Content))
        reasoning = "".join(e.text for e in self._events if isinstance(e, Reasoning))
        calls: dict[int, ToolCall] = {}
        for event in self._events:
            if isinstance(event, ToolStart):
                calls[event.index] = ToolCall(event.id, Function(event.name, ""))
            elif isinstance(event, ToolArguments):
                calls[event.index].function.arguments += event.text
        message = AssistantMessage("assistant", None if calls and not content else content)
        if reasoning:
            message.reasoning_content = reasoning
        if calls:
            message.tool_calls = list(calls.values())
        logprobs = self._format.chat(self._logprobs) if self._format is not None else None
        return ChatChoice(self._index, message, logprobs, self._reason)  # type: ignore[arg-type]


class CompletionCollector(_Collector):
    """Collects one choice of a completion."""

    def choice(self) -> CompletionChoice:
        """The complete choice."""
        text = "".join(e.text for e in self._events if isinstance(e, Content))
        entries: Sequence[Entry] = self._logprobs
        logprobs = self._format.completion(entries) if self._format is not None else None
        return CompletionChoice(self._index, text, logprobs, self._reason)  # type: ignore[arg-type]
