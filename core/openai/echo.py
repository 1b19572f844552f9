"""The prompt at the head of a completion that asked for it."""

from __future__ import annotations

from core.messages import Delta, EngineError, TokenLogprob
from core.openai.logprobs import Entry
from core.openai.prompts import Prompt
from core.openai.tokenizer import TextTokenizer


class Echo:
    """A prompt's text, with its log-probabilities when they were asked for."""

    def __init__(self, prompt: Prompt, tokenizer: TextTokenizer, *, logprobs: bool) -> None:
        self._ids = prompt.token_ids
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self.text = tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def entries(self, first: Delta) -> list[Entry]:
        """One entry a prompt token, from the first delta. Raises `EngineError` when the engine left them out."""
        if not self._logprobs:
            return []
        given: list[TokenLogprob | None] | None = first.prompt_logprobs
        if given is None or len(given) != len(self._ids):
            raise EngineError("The engine left out the prompt's log-probabilities that were asked for.")
        detokenizer = self._tokenizer.detokenizer(skip_special_tokens=self.text != self._tokenizer.decode(self._ids))
        entries, start = [], 0
        for token_id, logprob in zip(self._ids, given, strict=True):
            entries.append(Entry(start, token_id, logprob))
            start += len(detokenizer.push((token_id,)))
        return entries
