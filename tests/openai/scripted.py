"""A tokenizer with a chat template, made on the spot, and a scripted engine behind the pipeline's seam."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from core.messages import (
    Capabilities,
    ConstraintKind,
    Delta,
    EngineRequest,
    FinishReason,
    RequestContext,
    TokenLogprob,
)
from core.openai.card import ModelCard
from core.openai.tokenizer import TextTokenizer

CHATML = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }} Call in <tool_call> tags.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today? I am fine.",
    "Привет мир, 東京都 is a city; naïve café 😀😀 and 👩‍👩‍👧 families.",
    '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}',
]


def make_tokenizer(folder: Path, *, template: str | None = CHATML, vocab_size: int = 600) -> Path:
    """A byte-level BPE with ChatML tokens in `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"eos_token": "<|im_end|>", "bos_token": None}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_card(folder: Path, **changes: object) -> ModelCard:
    """A card for the tokenizer in `folder`."""
    tokenizer = TextTokenizer(folder, fast=False)
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    facts: dict[str, object] = {
        "names": ("tiny", "tiny-alias"),
        "tokenizer": str(folder),
        "max_model_len": 512,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_ids": (end,),
        "capabilities": Capabilities(constraints=frozenset(ConstraintKind), logprobs=True, prompt_logprobs=True),
        "lora": ("adapter",),
        "engine": "scripted 1",
        "created": 1_700_000_000,
        **changes,
    }
    return ModelCard(**facts)  # type: ignore[arg-type]


class ScriptedEngine:
    """Answers every request with the tokens of `text`, one a delta, and remembers what it was asked.

    `gate` given, it waits for it before each delta after the first `free` ones. Closed iterators are counted.
    """

    def __init__(self, tokenizer: TextTokenizer, text: str | Callable[[EngineRequest], str] = "Hello world") -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.requests: list[EngineRequest] = []
        self.contexts: list[RequestContext] = []
        self.per_delta = 1
        self.gate: asyncio.Event | None = None
        self.free = 1
        self.forever = False
        self.error: Exception | None = None
        self.error_after = 0
        self.cached = 0
        self.running = 0
        self.ended = asyncio.Event()
        self.started = asyncio.Event()
        self.completed = 0
        self.eos = tokenizer.token_id("<|im_end|>")

    def ids(self, request: EngineRequest) -> list[int]:
        text = self.text if isinstance(self.text, str) else self.text(request)
        return self.tokenizer.encode(text, add_special_tokens=False)

    async def generate(self, request: EngineRequest, context: RequestContext) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        self.contexts.append(context)
        self.running += 1
        self.started.set()
        try:
            async for delta in self._deltas(request):
                yield delta
            self.completed += 1
        finally:
            self.running -= 1
            self.ended.set()

    async def _deltas(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        ids = self.ids(request)
        assert self.eos is not None
        if not request.stop.ignore_eos:
            ids = [*ids, self.eos]
        cut = ids[: request.stop.max_tokens]
        place = 0
        while place < len(cut) or self.forever:
            if self.error is not None and place >= self.error_after:
                raise self.error
            if self.gate is not None and place >= self.free:
                await self.gate.wait()
            part = (
                [cut[i % len(cut)] for i in range(place, place + self.per_delta)]
                if self.forever
                else cut[place : place + self.per_delta]
            )
            first, place = place == 0, place + self.per_delta
            delta = Delta(part, cached_tokens=self.cached if first else None)
            if place >= len(cut) and not self.forever:
                stopped = cut[-1] == self.eos and not request.stop.ignore_eos
                delta.finish = FinishReason.STOP if stopped else FinishReason.LENGTH
                delta.stop_token = self.eos if stopped else None
            if request.logprobs is not None:
                delta.logprobs = [logprob(i, request.logprobs) for i in part]
            if first and request.prompt_logprobs is not None:
                rest: Sequence[int] = request.token_ids[1:]
                delta.prompt_logprobs = [None, *(logprob(i, request.prompt_logprobs) for i in rest)]
            yield delta
            await asyncio.sleep(0)


def logprob(token_id: int, top: int) -> TokenLogprob:
    """A made-up log-probability that depends on the token alone."""
    return TokenLogprob(token_id, -token_id / 100, 1, [(token_id + i, -(token_id + i) / 100) for i in range(top)])
