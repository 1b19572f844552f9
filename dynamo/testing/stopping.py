"""Stop conditions: when a sequence ends, and what it says of the end."""

from __future__ import annotations

import pytest

from dynamo import FinishReason
from dynamo.testing.kit import Conformance
from dynamo.testing.rule import rule
from dynamo.testing.target import Target


class Stopping(Conformance):
    """Rules about `StopConditions`; streaming has `max_tokens`."""

    @rule()
    async def test_stop_tokens(self, target: Target) -> None:
        """A stop token ends the sequence, is its last id, and is named by stop_token."""
        prompt, plain, at = await self._late_token(target)
        run = await target.generate(prompt, 24, stop_token_ids=(plain[at],))
        assert run.finish is FinishReason.STOP
        assert run.tokens == plain[: at + 1]
        assert run.stop_token == plain[at]

    @rule()
    async def test_any_of_several_stop_tokens(self, target: Target) -> None:
        """The first of several stop tokens that comes ends the sequence."""
        prompt, plain, at = await self._late_token(target)
        first = min(at, 1)
        run = await target.generate(prompt, 24, stop_token_ids=(plain[at], plain[first]))
        assert (run.finish, run.stop_token) == (FinishReason.STOP, plain[plain.index(plain[first])])
        assert run.tokens == plain[: plain.index(plain[first]) + 1]

    @rule()
    async def test_min_tokens_hold_back_stop_tokens(self, target: Target) -> None:
        """A stop token cannot be chosen before min_tokens tokens were generated."""
        prompt, plain, at = await self._late_token(target)
        least = at + 4
        run = await target.generate(prompt, 24, stop_token_ids=(plain[at],), min_tokens=least)
        assert len(run.tokens) >= least
        assert plain[at] not in run.tokens[:least], f"stop token {plain[at]} came before {least} tokens: {run.tokens}"
        assert run.tokens[:at] == plain[:at], "min_tokens changed tokens before the stop token"

    @rule()
    async def test_min_tokens_count_prior_tokens(self, target: Target) -> None:
        """min_tokens counts prior_tokens as generated."""
        prompt, plain, at = await self._late_token(target)
        if at < 2:
            pytest.skip(f"not tried: the engine repeats itself at once: {plain}")
        run = await target.generate(prompt + plain[:at], 8, prior_tokens=at, stop_token_ids=(plain[at],), min_tokens=at)
        assert (run.tokens, run.finish) == ([plain[at]], FinishReason.STOP)

    @rule("sampling.logit_bias")
    async def test_end_of_sequence(self, target: Target) -> None:
        """Each of the model's end-of-sequence tokens ends the sequence with STOP, unless ignore_eos."""
        prompt = target.prompt(7, "eos")
        for eos in self._eos(target):
            bias = {eos: 100.0}
            run = await target.generate(prompt, 6, ignore_eos=False, logit_bias=bias)
            assert (run.tokens, run.finish, run.stop_token) == ([eos], FinishReason.STOP, eos)
            run = await target.generate(prompt, 6, ignore_eos=True, logit_bias=bias)
            assert (run.tokens, run.finish, run.stop_token) == ([eos] * 6, FinishReason.LENGTH, None)

    @rule("sampling.logit_bias")
    async def test_min_tokens_hold_back_end_of_sequence(self, target: Target) -> None:
        """No end-of-sequence token can be chosen before min_tokens tokens were generated."""
        every = self._eos(target)
        run = await target.generate(
            target.prompt(7, "eos later"), 12, ignore_eos=False, min_tokens=5, logit_bias={every[0]: 100.0}
        )
        assert not set(every) & set(run.tokens[:5]), f"end of sequence came before 5 tokens: {run.tokens}"
        assert run.tokens[5:] == [every[0]]
        assert run.finish is FinishReason.STOP

    @rule("sampling.logit_bias")
    async def test_ignore_eos_keeps_stop_tokens(self, target: Target) -> None:
        """With ignore_eos a stop token still ends the sequence, even when it is the end-of-sequence token."""
        eos = self._eos(target)[0]
        prompt = target.prompt(7, "eos as stop token")
        run = await target.generate(prompt, 6, ignore_eos=True, stop_token_ids=(eos,), logit_bias={eos: 100.0})
        assert (run.tokens, run.finish, run.stop_token) == ([eos], FinishReason.STOP, eos)

    async def _late_token(self, target: Target) -> tuple[list[int], list[int], int]:
        """A prompt, its greedy answer, and the latest position in it whose token had not come before."""
        prompt = target.prompt(18, "late token")
        plain = (await target.generate(prompt, 16)).tokens
        return prompt, plain, max(plain.index(token) for token in plain)

    def _eos(self, target: Target) -> tuple[int, ...]:
        eos = target.host.info.eos_token_ids
        if not eos:
            pytest.skip(f"not applicable: engine '{self.kit.name}' has no end-of-sequence token")
        return eos
