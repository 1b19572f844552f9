"""Structured output: a model with random weights can say nothing but what its constraint allows."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from core.messages import (
    Constraint,
    ConstraintKind,
    Delta,
    FinishReason,
    RequestRejected,
    SamplingParams,
    StopConditions,
)
from tests.engines.torch.conftest import EOS, Engine, Running, prompt_of

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DATE = r"(19|20)\d\d-(0[1-9]|1[0-2])-[0-2]\d"
LARK = 'start: "SELECT " column " FROM " table\ncolumn: "id" | "name"\ntable: /[a-z]{3,5}/'
GBNF = 'root ::= ("yes" | "no") "!"'
CHOICES = ["red fox", "the cat", 'a "quoted" dog']
SAMPLING = SamplingParams(temperature=1.0, seed=3)


class Speaker:
    """Asks for text under a constraint."""

    def __init__(self, running: Running, folder: Path) -> None:
        self.running = running
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    async def say(self, kind: ConstraintKind, value: str = "", count: int = 200, **rest: Any) -> tuple[str, Delta]:
        """The text, and the terminal delta."""
        stop = StopConditions(max_tokens=count, **rest.pop("stop", {}))
        sampling = rest.pop("sampling", SAMPLING)
        request = self.running.request(
            prompt_of(20), stop=stop, sampling=sampling, constraint=Constraint(kind, value), **rest
        )
        deltas = await self.running.deltas(request)
        tokens = [token for delta in deltas for token in delta.token_ids]
        return self.text(tokens), deltas[-1]

    def text(self, tokens: list[int]) -> str:
        """What tokens spell."""
        spelt: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return spelt


async def test_every_kind_in_one_batch(llama: Path, engine: Engine) -> None:
    """Each text is of its language and the sequence ends by itself, beside a request without a constraint."""
    async with engine(llama, num_kv_blocks=200) as running:
        speaker = Speaker(running, llama)
        kinds = ConstraintKind
        schema, any_object, regex, lark, gbnf, choice, free = await asyncio.gather(
            speaker.say(kinds.JSON_SCHEMA, json.dumps(SCHEMA)),
            speaker.say(kinds.JSON_OBJECT, count=400),
            speaker.say(kinds.REGEX, DATE),
            speaker.say(kinds.GRAMMAR, LARK),
            speaker.say(kinds.GRAMMAR, GBNF),
            speaker.say(kinds.CHOICE, json.dumps(CHOICES)),
            running.tokens(prompt_of(20), 30, SAMPLING),
        )
        assert free == await running.tokens(prompt_of(20), 30, SAMPLING)
        await running.idle()
    found = json.loads(schema[0])
    assert set(found) == set(SCHEMA["required"])
    assert 0 <= found["age"] <= 99
    assert any_object[1].finish is FinishReason.LENGTH or isinstance(json.loads(any_object[0]), dict)
    assert any_object[0].lstrip().startswith("{")
    assert re.fullmatch(DATE, regex[0])
    assert re.fullmatch(r"SELECT (id|name) FROM [a-z]{3,5}", lark[0])
    assert gbnf[0] in ("yes!", "no!")
    assert choice[0] in CHOICES
    assert all(delta.finish is FinishReason.STOP for _, delta in (schema, regex, lark, gbnf, choice))


async def test_a_complete_text_ends_the_sequence(llama: Path, engine: Engine) -> None:
    """Nothing can follow: the sequence stops at once, naming no stop token, even against ignore_eos and min_tokens."""
    async with engine(llama) as running:
        speaker = Speaker(running, llama)
        for stop in ({}, {"ignore_eos": True}, {"min_tokens": 50}, {"ignore_eos": True, "min_tokens": 50}):
            text, last = await speaker.say(ConstraintKind.REGEX, "abc", stop=stop)
            assert (text, last.finish) == ("abc", FinishReason.STOP)
            assert last.stop_token in (None, EOS)


async def test_min_tokens_holds_the_end_off_while_the_text_can_go_on(llama: Path, engine: Engine) -> None:
    """An expression that may end anywhere goes on until min_tokens."""
    async with engine(llama) as running:
        text, last = await Speaker(running, llama).say(
            ConstraintKind.REGEX, "[a-z]+", stop={"min_tokens": 12}, sampling=SamplingParams(temperature=0), count=40
        )
        assert len(text) >= 12
        assert last.finish in (FinishReason.STOP, FinishReason.LENGTH)


async def test_a_constraint_outranks_bans(llama: Path, engine: Engine) -> None:
    """Where the constraint leaves only banned tokens, its text is spelt all the same."""
    async with engine(llama) as running:
        speaker = Speaker(running, llama)
        tokens = Tokenizer.from_file(str(llama / "tokenizer.json")).encode("b").ids
        sampling = SamplingParams(temperature=0, bad_token_sequences=(tuple(tokens),))
        text, _ = await speaker.say(ConstraintKind.REGEX, "abc", sampling=sampling)
        assert text == "abc"


async def test_a_resumed_text_goes_on(llama: Path, engine: Engine) -> None:
    """Tokens of an earlier attempt count as read; tokens that break the constraint are refused."""
    async with engine(llama) as running:
        speaker = Speaker(running, llama)
        constraint = Constraint(ConstraintKind.REGEX, DATE)
        stop = StopConditions(max_tokens=50)
        whole = await running.tokens(prompt_of(20), sampling=SAMPLING, stop=stop, constraint=constraint)
        resumed = await running.tokens(
            prompt_of(20) + whole[:3], sampling=SAMPLING, stop=stop, constraint=constraint, prior_tokens=3
        )
        assert whole[:3] + resumed == whole
        assert re.fullmatch(DATE, speaker.text(whole))
        with pytest.raises(RequestRejected, match="already generated do not fit"):
            await running.tokens(prompt_of(20), sampling=SAMPLING, stop=stop, constraint=constraint, prior_tokens=5)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ConstraintKind.JSON_SCHEMA, "{not json"),
        (ConstraintKind.JSON_SCHEMA, '{"type": "nonsense"}'),
        (ConstraintKind.REGEX, "(unclosed"),
        (ConstraintKind.GRAMMAR, "start: undefined_rule"),
        (ConstraintKind.CHOICE, "[]"),
        (ConstraintKind.CHOICE, '"text"'),
        (ConstraintKind.CHOICE, "[1, 2]"),
    ],
)
async def test_what_does_not_compile_is_refused(kind: ConstraintKind, value: str, llama: Path, engine: Engine) -> None:
    """Before the first delta, in a sentence, every time, and nothing is left behind."""
    async with engine(llama) as running:
        for _ in range(2):
            with pytest.raises(RequestRejected, match="does not compile") as refusal:
                await running.deltas(running.request(prompt_of(5), constraint=Constraint(kind, value)))
            assert refusal.value.param == "response_format"
        await running.idle()


async def test_without_a_tokenizer_it_is_refused(tmp_path: Path, llama: Path, engine: Engine) -> None:
    """The engine serves token ids without one; structured output says what is missing."""
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((llama / file).read_bytes())
    async with engine(tmp_path) as running:
        await running.tokens(prompt_of(5), 2)
        with pytest.raises(RequestRejected, match="tokenizer"):
            await running.tokens(prompt_of(5), constraint=Constraint(ConstraintKind.JSON_OBJECT))


async def test_structured_output_survives_preemption(llama: Path, engine: Engine) -> None:
    """Four constrained sequences in a cache with room for less than two."""
    async with engine(llama, block_size=4, num_kv_blocks=20) as running:
        speaker = Speaker(running, llama)
        pattern = "[a-z]{50}"
        seeds = [SamplingParams(seed=seed) for seed in range(4)]  # equal ones would share every block
        jobs = [speaker.say(ConstraintKind.REGEX, pattern, count=80, sampling=sampling) for sampling in seeds]
        found = await asyncio.gather(*jobs)
        assert all(re.fullmatch(pattern, text) for text, _ in found)
        assert running.engine.num_preemptions > 0
        await running.idle()
