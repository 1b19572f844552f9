"""Disaggregated answers: what one engine prefilled and another decodes is what one engine alone would say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dynamo import Constraint, ConstraintKind, EngineRequest, FinishReason, Rendezvous
from dynamo.testing.kit import Conformance
from dynamo.testing.pair import Pair
from dynamo.testing.rule import rule
from dynamo.testing.run import Run
from dynamo.testing.target import Target

ROLES = ("roles.aggregated", "roles.prefill", "roles.decode")
KINDS = pytest.mark.parametrize("kind", list(Rendezvous))
REGEX = r"[0-9]{2}-(cat|dog)"
SCHEMA = {"type": "object", "properties": {"flag": {"type": "boolean"}}, "required": ["flag"]}


class Handing(Conformance):
    """Rules about equality with the aggregated engine, through the core's own drivers."""

    @KINDS
    @rule(*ROLES)
    async def test_prompts_of_every_length(self, target: Target, pair: Pair, kind: Rendezvous) -> None:
        """Prompts from one token to the longest, around every edge of a block, are answered alike."""
        size, most = target.block_size, target.host.info.max_model_len
        lengths = [1, 2, size - 1, size, size + 1, 2 * size, 3 * size + 2, most // 2, most - 8, most - 1]
        prompts = [target.prompt(length, f"length {length}") for length in lengths if length > 0]
        await self._answers_alike(target, pair, kind, [target.ask(prompt, 8) for prompt in prompts])

    @KINDS
    @rule(*ROLES, "sampling.seed", "sampling.temperature")
    async def test_seeded(self, target: Target, pair: Pair, kind: Rendezvous) -> None:
        """A seeded request draws the same tokens: the seed's position goes on behind the prefill side's token."""
        sampling: list[dict[str, Any]] = [{"temperature": 1.0}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9}]
        asked = [
            target.ask(target.prompt(12 + number, f"seeded {number}"), 24, seed=number, **_declared(target, fields))
            for number, fields in enumerate(sampling * 3)
        ]
        await self._answers_alike(target, pair, kind, asked)

    @rule(*ROLES, "sampling.seed", "sampling.temperature")
    async def test_choices_of_one_prompt(self, target: Target, pair: Pair) -> None:
        """Requests that share their prompt, as the n choices of a client do, are answered alike and apart."""
        prompt = target.prompt(2 * target.block_size + 3, "choices")
        asked = [target.ask(prompt, 16, seed=number, temperature=1.2) for number in range(5)]
        runs = await self._answers_alike(target, pair, pair.kinds[0], asked)
        assert len({tuple(run.tokens) for run in runs}) > 1, "five seeds gave one answer"

    @KINDS
    @rule(*ROLES)
    async def test_shared_prefixes(self, target: Target, pair: Pair, kind: Rendezvous) -> None:
        """Prompts with common beginnings, at once and one after the other, are answered alike."""
        size = target.block_size
        prefix = target.prompt(3 * size, f"shared {kind}")
        tails = [target.prompt(1 + 5 * number, f"tail {number}") for number in range(6)]
        for _ in range(2):
            await self._answers_alike(target, pair, kind, [target.ask(prefix + tail, 8) for tail in tails])

    @KINDS
    @rule(*ROLES, "logprobs")
    async def test_logprobs(self, target: Target, pair: Pair, kind: Rendezvous) -> None:
        """Log-probabilities are those of the aggregated engine, the first token's too."""
        asked = [target.ask(target.prompt(11 + 7 * n, f"logprobs {n}"), 8, logprobs=n) for n in (0, 3, 5)]
        await self._answers_alike(target, pair, kind, asked)

    @rule(*ROLES, "prompt_logprobs")
    async def test_prompt_logprobs_of_the_other_engine(self, target: Target, pair: Pair) -> None:
        """Log-probabilities of the prompt come with the first delta, though another engine computed them."""
        asked = [target.ask(target.prompt(2 * target.block_size + 5, "prompt logprobs"), 4, prompt_logprobs=3)]
        for _ in range(2):
            await self._answers_alike(target, pair, pair.kinds[0], asked)

    @rule(*ROLES, "sampling.frequency_penalty", "sampling.presence_penalty")
    async def test_penalties(self, target: Target, pair: Pair) -> None:
        """Penalties count the prefill side's token."""
        # Among few tokens each count decides which of them is next.
        few = dict.fromkeys(target.prompt(4, "few"), 100.0)
        asked = []
        for number in range(4):
            fields: dict[str, Any] = {"presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3}
            prompt = target.prompt(9 + number, f"penalised {number}")
            asked.append(target.ask(prompt, 24, **_declared(target, fields)))
            fields = {"frequency_penalty": 0.5 + number / 2, "logit_bias": few}
            asked.append(target.ask(prompt, 24, **_declared(target, fields)))
        await self._answers_alike(target, pair, pair.kinds[0], asked)

    @rule(*ROLES, "sampling.logit_bias", "sampling.bad_token_sequences")
    async def test_banned_sequences(self, target: Target, pair: Pair) -> None:
        """A banned sequence is banned also where its first token came from the prefill side."""
        prompt = target.prompt(9, "banned")
        first, second = (await target.generate(prompt, 2)).tokens
        asked = target.ask(prompt, 12, bad_token_sequences=((first, second),))
        (run,) = await self._answers_alike(target, pair, pair.kinds[0], [asked])
        assert run.tokens[:2] != [first, second]

    @rule(*ROLES, "constraints")
    async def test_structured_output(self, target: Target, pair: Pair) -> None:
        """A constraint goes on behind the token that the prefill side chose under it."""
        constraints = {
            ConstraintKind.REGEX: REGEX,
            ConstraintKind.CHOICE: json.dumps(["alpha", "beta", "gamma"]),
            ConstraintKind.JSON_SCHEMA: json.dumps(SCHEMA),
        }
        asked = [
            target.ask(
                target.prompt(9, f"constrained {kind}"), 48, ignore_eos=False, constraint=Constraint(kind, value)
            )
            for kind, value in constraints.items()
            if kind in target.can.constraints
        ]
        await self._answers_alike(target, pair, pair.kinds[0], asked)

    @KINDS
    @rule(*ROLES)
    async def test_ending_at_once(self, target: Target, pair: Pair, kind: Rendezvous) -> None:
        """A sequence that ends with its first token, or its second, ends so, and each token comes exactly once."""
        prompt = target.prompt(target.block_size + 4, f"ends {kind}")
        first, second = (await target.generate(prompt, 2)).tokens
        asked = [
            target.ask(prompt, 1),
            target.ask(prompt, 2),
            target.ask(prompt, 8, stop_token_ids=(first,)),
            target.ask(prompt, 8, stop_token_ids=(second,)),
        ]
        runs = await self._answers_alike(target, pair, kind, asked)
        assert [run.finish for run in runs[:3]] == [FinishReason.LENGTH, FinishReason.LENGTH, FinishReason.STOP]
        assert [len(run.tokens) for run in runs[:3]] == [1, 2, 1]

    @rule(*ROLES)
    async def test_min_tokens(self, target: Target, pair: Pair) -> None:
        """min_tokens counts the prefill side's token, and holds it back from ending the sequence."""
        prompt = target.prompt(10, "min tokens")
        first = (await target.generate(prompt, 1)).tokens[0]
        asked = [target.ask(prompt, 6, stop_token_ids=(first,), min_tokens=count) for count in (0, 1, 2, 6)]
        await self._answers_alike(target, pair, pair.kinds[0], asked)

    @rule(*ROLES)
    async def test_resumed_sequence(self, target: Target, pair: Pair) -> None:
        """A sequence that an earlier worker began goes on alike when its tokens so far are prefilled elsewhere."""
        prompt = target.prompt(14, "resumed")
        whole = (await target.generate(prompt, 12)).tokens
        asked = target.ask(prompt + whole[:5], 7, prior_tokens=5)
        async with pair.relay(pair.kinds[0]) as relay:
            assert (await relay.complete(asked)).tokens == whole[5:]

    @KINDS
    @rule(*ROLES)
    async def test_many_at_once(self, target: Target, pair: Pair, kind: Rendezvous) -> None:
        """Requests of all lengths at the same time are answered as each is alone."""
        asked = [target.ask(target.prompt(1 + 9 * n % 70, f"crowd {kind} {n}"), 4 + n % 9) for n in range(24)]
        await self._answers_alike(target, pair, kind, asked, together=True)

    @rule(*ROLES, "canonical_kv")
    async def test_other_layouts(self, target: Target, pair: Pair) -> None:
        """Engines of different block size, or other layout, exchange canonical KV both ways, and answer alike."""
        size = target.block_size
        asked = [target.ask(target.prompt(n, f"other layout {n}"), 8) for n in (1, size, 2 * size + 1, 5 * size - 3)]
        for fields in ({"block_size": 2 * size}, {"block_size": max(1, size // 2)}, *self.other_layouts):
            for sides in ({"decode": fields}, {"prefill": fields}):
                async with self.kit.fresh_pair(**sides) as uneven:
                    for kind in uneven.kinds:
                        again = [target.renamed(request) for request in asked]
                        await self._answers_alike(target, uneven, kind, again)

    async def _answers_alike(
        self, target: Target, pair: Pair, kind: Rendezvous, asked: list[EngineRequest], *, together: bool = False
    ) -> list[Run]:
        """Asks both, one by one or all together, and compares everything that a client could see."""
        pair.require(kind)
        expected = [await target.complete(request) for request in asked]
        again = [target.renamed(request) for request in asked]
        async with pair.relay(kind) as relay:
            if together:
                runs = await relay.together(again)
            else:
                runs = [await relay.complete(request) for request in again]
            assert relay.remote() == len(asked), f"streams came about so: {dict(relay.decode_side.ends)}"
        for run, other in zip(runs, expected, strict=True):
            what = f"prompt of {len(run.request.token_ids)} tokens by {kind}"
            assert run.tokens == other.tokens, what
            assert (run.finish, run.stop_token) == (other.finish, other.stop_token), what
            _same_logprobs(run.logprobs, other.logprobs, self.logprob_tolerance)
            if other.prompt_logprobs is not None:
                assert run.prompt_logprobs is not None, f"no prompt_logprobs: {what}"
                _same_logprobs(run.prompt_logprobs, other.prompt_logprobs, self.logprob_tolerance)
        return runs


def _same_logprobs(ours: list[Any], theirs: list[Any], tolerance: float) -> None:
    assert [entry and entry.token_id for entry in ours] == [entry and entry.token_id for entry in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if other is not None:
            assert mine.logprob == pytest.approx(other.logprob, abs=tolerance)
            values = [value for _, value in other.top]
            assert [value for _, value in mine.top] == pytest.approx(values, abs=tolerance)


def _declared(target: Target, fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name in target.can.sampling}
