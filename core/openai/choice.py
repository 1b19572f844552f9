"""One choice of an answer: engine deltas in, pieces of the answer out."""

from __future__ import annotations

from typing import Protocol

from core.messages import Delta, EngineError, FinishReason
from core.openai.detokenize import Detokenizer
from core.openai.echo import Echo
from core.openai.events import Content, Event, TextParser, ToolStart
from core.openai.logprobs import Entry
from core.openai.stops import StopMatcher


class ChoiceWriter(Protocol):
    """Makes a choice's pieces presentable: bytes for the socket, or b"" where the answer is collected."""

    def text(self, text: str) -> bytes:
        """Plain text, the case that has to be fast."""

    def events(self, events: list[Event], logprobs: list[Entry], tokens: int) -> bytes:
        """Anything else. `logprobs` is empty when none were asked for; `tokens`: generated so far."""

    def finish(self, reason: str, tokens: int) -> bytes:
        """The end."""


class Choice:
    """Detokenizes, cuts at stop strings, parses and writes one sequence."""

    __slots__ = (
        "_detokenizer", "_echo", "_entries", "_hide_stop_token", "_parser", "_plain", "_released", "_stops", "_total",
        "_writer", "cached_tokens", "called", "discard", "finished", "reason", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        writer: ChoiceWriter,
        detokenizer: Detokenizer,
        *,
        stops: StopMatcher | None = None,
        parser: TextParser | None = None,
        logprobs: bool = False,
        hide_stop_token: bool = True,
        counted: bool = False,
        echo: Echo | None = None,
        discard: bool = False,
    ) -> None:
        """`counted`: the writer wants the token count with every piece. `echo`: a prompt that comes first.
        `discard`: nothing that is generated is shown.
        """
        self._writer = writer
        self._detokenizer = detokenizer
        self._stops = stops
        self._parser = parser
        self._entries: list[Entry] | None = [] if logprobs else None
        self._hide_stop_token = hide_stop_token
        self._echo = echo
        self._total = self._released = len(echo.text) if echo is not None else 0
        self._plain = stops is None and parser is None and not (logprobs or counted or echo or discard)
        self.discard = discard
        self.tokens = 0
        """Generated so far."""
        self.cached_tokens = 0
        self.called = False
        """A tool call has begun."""
        self.reason: str | None = None
        """Why it ended."""
        self.finished = False
        """Nothing may be pushed any more; the engine can let go."""

    def push(self, delta: Delta) -> bytes:
        """What a delta adds to the answer. Raises `EngineError` when the engine gave the request up."""
        ids = delta.token_ids
        if delta.finish is None and self._plain:
            self.tokens += len(ids)
            if delta.cached_tokens is not None:
                self.cached_tokens = delta.cached_tokens
            text = self._detokenizer.push(ids)
            return self._writer.text(text) if text else b""
        return self._push(delta)

    def _push(self, delta: Delta) -> bytes:
        if delta.finish is FinishReason.ABORT:
            raise EngineError("The engine gave this request up before it was complete; send it again.")
        if delta.cached_tokens is not None:
            self.cached_tokens = delta.cached_tokens
        data = b""
        if self._echo is not None:
            data = self._writer.events([Content(self._echo.text)], self._echo.entries(delta), 0)
            self._echo = None
        if self.discard:
            return data + self._end("length")
        ids = delta.token_ids
        self.tokens += len(ids)
        ended = delta.finish is not None
        shown = ids[:-1] if ended and delta.stop_token is not None and self._hide_stop_token else ids
        text = self._decode(shown, delta)
        if ended:
            tail = self._detokenizer.flush()
            self._total += len(tail)
            text += tail
        if self._stops is not None:
            text = self._stops.push(text)
            if self._stops.matched is not None:
                ended = True
            elif ended:
                text += self._stops.flush()
        events: list[Event] = [Content(text)] if text else []
        if self._parser is not None:
            events = self._parser.push(text) if text else []
            if ended:
                events += self._parser.finish()
            self.called = self.called or any(type(e) is ToolStart for e in events)
        logprobs = self._release(len(text), ended) if self._entries is not None else []
        if events or logprobs:
            data += self._writer.events(events, logprobs, self.tokens)
        if ended:
            reason = "length" if delta.finish is FinishReason.LENGTH and not self._matched else "stop"
            data += self._end("tool_calls" if self.called and reason == "stop" else reason)
        return data

    def _end(self, reason: str) -> bytes:
        self.finished = True
        self.reason = reason
        return self._writer.finish(reason, self.tokens)

    @property
    def _matched(self) -> bool:
        return self._stops is not None and self._stops.matched is not None

    def _decode(self, ids: list[int], delta: Delta) -> str:
        if self._entries is None:
            return self._detokenizer.push(ids)
        if delta.logprobs is None or len(delta.logprobs) < len(ids):
            raise EngineError("The engine sent tokens without the log-probabilities that were asked for.")
        text = ""
        for token_id, logprob in zip(ids, delta.logprobs, strict=False):
            self._entries.append(Entry(self._total, token_id, logprob))
            piece = self._detokenizer.push((token_id,))
            self._total += len(piece)
            text += piece
        return text

    def _release(self, shown: int, ended: bool) -> list[Entry]:
        """Entries whose text is out, so that they tell no more of a withheld stop string than the text does."""
        assert self._entries is not None
        self._released += shown
        held = self._released < self._total
        if (held and not ended) or self._matched:
            out = [e for e in self._entries if e.start < self._released]
            self._entries = [] if ended else self._entries[len(out) :]
            return out
        out, self._entries = self._entries, []
        return out
