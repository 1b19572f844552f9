"""Log-probabilities in OpenAI's two shapes, each entry with the text it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from core.messages import TokenLogprob
from core.openai.responses import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from core.openai.tokenizer import TextTokenizer

_FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class Entry(NamedTuple):
    """A generated (or echoed) token, where its text starts, and its log-probability if it has one."""

    start: int
    token_id: int
    logprob: TokenLogprob | None


class LogprobFormat:
    """Spells entries for one request."""

    def __init__(self, tokenizer: TextTokenizer, top: int, *, as_ids: bool) -> None:
        """`top`: likeliest tokens an entry shows. `as_ids` spells tokens `token_id:N`."""
        self._tokenizer = tokenizer
        self._top = top
        self._as_ids = as_ids

    def chat(self, entries: Iterable[Entry]) -> ChatLogprobs:
        """The shape of chat completions."""
        content = []
        for entry in entries:
            assert entry.logprob is not None
            top = [
                TopLogprob(self._name(i), max(p, _FLOOR), list(self._tokenizer.token_bytes(i)))
                for i, p in entry.logprob.top[: self._top]
            ]
            raw = list(self._tokenizer.token_bytes(entry.token_id))
            content.append(ChatLogprob(self._name(entry.token_id), max(entry.logprob.logprob, _FLOOR), raw, top))
        return ChatLogprobs(content)

    def completion(self, entries: Sequence[Entry]) -> CompletionLogprobs:
        """The shape of completions. The first token of an echoed prompt has no log-probability."""
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            if entry.logprob is None:
                tops.append(None)
                continue
            top = {self._name(i): max(p, _FLOOR) for i, p in entry.logprob.top[: self._top]}
            top.setdefault(self._name(entry.token_id), max(entry.logprob.logprob, _FLOOR))
            tops.append(top)
        return CompletionLogprobs(
            tokens=[self._name(e.token_id) for e in entries],
            token_logprobs=[None if e.logprob is None else max(e.logprob.logprob, _FLOOR) for e in entries],
            top_logprobs=tops if self._top else None,
            text_offset=[e.start for e in entries],
        )

    def _name(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
