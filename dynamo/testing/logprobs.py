"""Log-probabilities: of the tokens generated, of the likeliest beside them, and of the prompt."""

from __future__ import annotations

import math

import pytest

from dynamo import TokenLogprob
from dynamo.testing.kit import Conformance
from dynamo.testing.rule import rule
from dynamo.testing.sampling import TOP
from dynamo.testing.target import Target


class Logprobs(Conformance):
    """Rules about `TokenLogprob`; every stream is checked for one entry a token."""

    @rule("logprobs")
    async def test_entries_are_consistent(self, target: Target) -> None:
        """Each entry has the likeliest tokens asked for, in order, adding up to no more than 1, with right ranks."""
        for count in (0, 1, 5, TOP):
            run = await target.generate(target.prompt(9, "entries"), 12, logprobs=count, **_sampled(target))
            for entry in run.logprobs:
                self._check(entry, count)

    @rule("logprobs")
    async def test_fewer_are_the_beginning_of_more(self, target: Target) -> None:
        """The likeliest tokens and their log-probabilities do not depend on how many were asked for."""
        prompt = target.prompt(9, "fewer")
        few = await target.generate(prompt, 8, logprobs=3)
        many = await target.generate(prompt, 8, logprobs=TOP)
        for a, b in zip(few.logprobs, many.logprobs, strict=True):
            self._same(a.top, b.top[:3])
            assert a.logprob == pytest.approx(b.logprob, abs=self.logprob_tolerance)

    @rule("logprobs", "sampling.temperature")
    async def test_temperature_does_not_show(self, target: Target) -> None:
        """Log-probabilities are the model's own: temperature, truncation, bias and penalties do not show in them."""
        prompt = target.prompt(9, "own")
        plain = (await target.generate(prompt, 1, logprobs=5)).logprobs[0].top
        token = plain[3][0]
        changes = {"temperature": 2.0, "top_k": 2, "top_p": 0.3, "min_p": 0.5, "repetition_penalty": 1.5}
        each = [{field: value} for field, value in changes.items()] + [{"logit_bias": {token: 100.0}}]
        for change in each:
            if change.keys() <= target.can.sampling:
                run = await target.generate(prompt, 1, logprobs=5, **change)
                self._same(run.logprobs[0].top, plain)

    @rule("logprobs")
    async def test_batch_mates_do_not_show(self, target: Target) -> None:
        """Log-probabilities are the same in a batch and alone."""
        prompts = [target.prompt(4 + 5 * i, f"logprobs {i}") for i in range(5)]
        batch = await target.together(target.ask(prompt, 8, logprobs=3) for prompt in prompts)
        for prompt, run in zip(prompts, batch, strict=True):
            alone = await target.generate(prompt, 8, logprobs=3)
            for a, b in zip(run.logprobs, alone.logprobs, strict=True):
                self._same(a.top, b.top)

    @rule("prompt_logprobs")
    async def test_prompt_logprobs(self, target: Target) -> None:
        """prompt_logprobs come with the first delta: one entry a prompt token, the first None, cached or not."""
        prompt = target.prompt(40, "prompt logprobs")
        for what in ("computed", "cached"):
            run = await target.generate(prompt, 2, prompt_logprobs=4)
            entries = run.prompt_logprobs
            assert entries is not None, f"no prompt_logprobs when the prompt is {what}"
            assert len(entries) == len(prompt), f"{len(entries)} entries for {len(prompt)} prompt tokens, {what}"
            assert entries[0] is None
            for token, entry in zip(prompt[1:], entries[1:], strict=True):
                assert entry is not None
                assert entry.token_id == token
                self._check(entry, 4)

    @rule("prompt_logprobs", "logprobs")
    async def test_prompt_and_output_agree(self, target: Target) -> None:
        """A token has the same log-probability whether it was generated or given."""
        prompt = target.prompt(21, "agree")
        generated = await target.generate(prompt, 10, logprobs=4)
        given = await target.generate(prompt + generated.tokens, 1, prompt_logprobs=4)
        assert given.prompt_logprobs is not None
        for a, b in zip(generated.logprobs, given.prompt_logprobs[len(prompt) :], strict=True):
            assert b is not None
            assert a.token_id == b.token_id
            assert a.logprob == pytest.approx(b.logprob, abs=self.logprob_tolerance)
            self._same(a.top, b.top)

    def _check(self, entry: TokenLogprob, count: int) -> None:
        tokens, values = [token for token, _ in entry.top], [value for _, value in entry.top]
        assert len(tokens) == len(set(tokens)) == count, f"asked for the {count} likeliest, found {entry}"
        assert values == sorted(values, reverse=True), f"the likeliest comes first: {entry}"
        assert all(value <= 1e-6 for value in [entry.logprob, *values]), f"a log-probability is above 0: {entry}"
        assert math.fsum(math.exp(value) for value in values) <= 1 + self.logprob_tolerance, f"more than 1: {entry}"
        if entry.token_id in tokens:
            at = tokens.index(entry.token_id)
            assert entry.logprob == pytest.approx(values[at], abs=1e-6), f"two values for one token: {entry}"
            # Of tokens that are equally likely any may be called the likelier.
            ties = [i + 1 for i, value in enumerate(values) if value == values[at]]
            assert entry.rank is not None
            assert entry.rank in ties or entry.rank == at + 1, f"rank {entry.rank} is wrong: {entry}"
        elif values:
            assert entry.logprob <= values[-1] + 1e-6, f"likelier than the likeliest: {entry}"
            assert entry.rank is None or entry.rank > count, f"rank {entry.rank} is wrong: {entry}"
        assert entry.rank is None or entry.rank >= 1

    def _same(self, a: list[tuple[int, float]], b: list[tuple[int, float]]) -> None:
        """Raises unless both lists say the same; neighbours that are equally likely may change places."""
        assert [value for _, value in a] == pytest.approx([value for _, value in b], abs=self.logprob_tolerance)
        other = dict(b)
        for token, value in a[:-1]:
            if token in other:
                assert other[token] == pytest.approx(value, abs=self.logprob_tolerance)
            else:
                assert value == pytest.approx(b[-1][1], abs=self.logprob_tolerance), f"token {token} is missing in {b}"


def _sampled(target: Target) -> dict[str, float]:
    """Sampling in which not only the likeliest tokens are chosen."""
    return {"temperature": 1.5} if target.greedy else {}
