"""Structured output: what a constrained request spells, read with the model's own tokenizer."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tokenizers import Tokenizer

from dynamo import Constraint, ConstraintKind, EngineConfig, FinishReason, RequestRejected
from dynamo.testing.kit import Conformance
from dynamo.testing.rule import rule
from dynamo.testing.run import Run
from dynamo.testing.target import Target

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "flag": {"type": "boolean"},
    },
    "required": ["colour", "count", "flag"],
    "additionalProperties": False,
}
REGEX = r"[0-9]{3}-(cat|dog)[a-f]{2,4}"
MOST_BIASED = 256
"""Tokens with a bias; OpenAI's interface allows 300."""
CHOICES = ["alpha", "beta", 'gamma, "quoted"']


class Structured(Conformance):
    """Rules about `Constraint`, one for each kind."""

    @rule("constraints.json_schema")
    async def test_json_schema(self, target: Target) -> None:
        """Output under a JSON schema is a document of that schema."""
        hint = self._hint(target)
        for text in await self._complete(target, ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA), **hint):
            value: Any = json.loads(text)
            assert value.keys() == {"colour", "count", "flag"}, text
            assert value["colour"] in ("red", "green"), text
            assert type(value["count"]) is int, text
            assert 0 <= value["count"] <= 9, text
            assert type(value["flag"]) is bool, text

    @rule("constraints.json_object")
    async def test_json_object(self, target: Target) -> None:
        """Output under json_object is a JSON object."""
        hint = self._hint(target, "{", "}")
        for text in await self._complete(target, ConstraintKind.JSON_OBJECT, "", **hint):
            assert type(json.loads(text)) is dict, text

    @rule("constraints.regex")
    async def test_regex(self, target: Target) -> None:
        """Output under a regular expression matches it from beginning to end."""
        for text in await self._complete(target, ConstraintKind.REGEX, REGEX):
            assert re.fullmatch(REGEX, text), text

    @rule("constraints.grammar")
    async def test_grammar(self, target: Target) -> None:
        """Output under a grammar is a text of its language."""
        for text in await self._complete(target, ConstraintKind.GRAMMAR, self.grammar):
            assert text in ("abcef", "abdef"), text

    @rule("constraints.choice")
    async def test_choice(self, target: Target) -> None:
        """Output under a choice is exactly one of the strings."""
        for text in await self._complete(target, ConstraintKind.CHOICE, json.dumps(CHOICES)):
            assert text in CHOICES, text

    @rule("constraints.choice")
    async def test_constraints_in_one_batch(self, target: Target) -> None:
        """Each request of a batch keeps to its own constraint, and those without one are not touched."""
        prompt = target.prompt(9, "mixed")
        plain = (await target.generate(prompt, 12)).tokens
        kinds = [Constraint(ConstraintKind.CHOICE, json.dumps([choice])) for choice in CHOICES]
        asked = [target.ask(prompt, 64, ignore_eos=False, constraint=constraint) for constraint in kinds]
        runs = await target.together([*asked, target.ask(prompt, 12)])
        assert [self._text(run) for run in runs[:-1]] == CHOICES
        assert runs[-1].tokens == plain

    @rule("constraints.choice", "continues.constraint")
    async def test_constrained_continuation(self, target: Target) -> None:
        """A constraint has read the prior_tokens: a sequence goes on as if it had never been interrupted."""
        prompt, choice = target.prompt(9, "constrained continuation"), json.dumps(CHOICES)
        fields = {"ignore_eos": False, "constraint": Constraint(ConstraintKind.CHOICE, choice)}
        whole = await target.generate(prompt, 64, **fields)
        for cut in range(1, len(whole.text_tokens)):
            rest = await target.generate(prompt + whole.tokens[:cut], 64, prior_tokens=cut, **fields)
            assert rest.text_tokens == whole.text_tokens[cut:], f"resumed after {cut} tokens"

    @rule()
    async def test_senseless_constraints(self, target: Target) -> None:
        """A constraint that does not compile is refused with RequestRejected before the first delta."""
        senseless = {
            ConstraintKind.JSON_SCHEMA: "{not json",
            ConstraintKind.REGEX: "(unclosed",
            ConstraintKind.GRAMMAR: "::= no grammar (",
            ConstraintKind.CHOICE: '"not a list"',
        }
        tried = [kind for kind in senseless if kind in target.can.constraints]
        if not tried:
            pytest.skip(f"not applicable: engine '{self.kit.name}' does not declare constraints")
        for kind in tried:
            request = target.ask(target.prompt(5, "senseless"), constraint=Constraint(kind, senseless[kind]))
            async with target.stream(request) as stream:
                with pytest.raises(RequestRejected):
                    await stream.next()
                assert not stream.run.deltas

    def _hint(self, target: Target, *liked: str) -> dict[str, Any]:
        """A bias for short documents, where the engine takes one: many a model goes on with white space for ever."""
        if "logit_bias" not in target.can.sampling:
            return {}
        tokenizer = self._tokenizer()
        tokens = range(min(tokenizer.get_vocab_size(), target.host.info.vocab_size))
        spaces = [token for token in tokens if tokenizer.decode([token]).isspace()]
        bias = dict.fromkeys(spaces[:MOST_BIASED], -100.0)
        for text in liked:
            if (token := tokenizer.token_to_id(text)) is not None:
                bias[token] = 100.0
        return {"logit_bias": bias}

    async def _complete(self, target: Target, kind: ConstraintKind, value: str, **fields: Any) -> list[str]:
        """Complete outputs, greedy and sampled together, at least one. An answer cut by max_tokens is none."""
        prompt = target.prompt(9, f"structured {kind}")
        variants: list[dict[str, Any]] = [{}]
        if {"temperature", "seed"} <= target.can.sampling:
            variants += [{"temperature": 1.0, "seed": seed} for seed in range(5)]
        asked = [
            target.ask(
                prompt, target.room(prompt, 192), ignore_eos=False, constraint=Constraint(kind, value), **v, **fields
            )
            for v in variants
        ]
        runs = await target.together(asked)
        done = [self._text(run) for run in runs if run.finish is FinishReason.STOP]
        cut = [self._text(run) for run in runs if run.finish is not FinishReason.STOP]
        assert done, f"no answer under {kind} was complete after 192 tokens; the first is {cut[0]!r}"
        return done

    def _text(self, run: Run) -> str:
        return self._tokenizer().decode(run.text_tokens, skip_special_tokens=True)

    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(EngineConfig(**self.kit.config).tokenizer_file()))
