"""Sampling: every parameter does what its documentation says, seen from the tokens and log-probabilities alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from dynamo.testing.kit import Conformance
from dynamo.testing.rule import rule
from dynamo.testing.target import Target

TOP = 20
"""Likeliest tokens that the rules ask for: as many as OpenAI's interface allows."""
DRAWS = 96
"""Single tokens drawn, each with a seed of its own, to see a distribution."""
SIGMAS = 5.0
"""How far a frequency may be from its probability."""
CERTAIN = 0.9
"""Probability above which a token is too likely for draws to differ reliably."""


class Sampling(Conformance):
    """Rules about `SamplingParams`, penalties excepted."""

    @rule("sampling.temperature", "logprobs")
    async def test_greedy_is_arg_max(self, target: Target) -> None:
        """At temperature 0 every token is the likeliest one."""
        run = await target.generate(target.prompt(17, "arg-max"), 24, logprobs=2)
        for entry in run.logprobs:
            best = entry.top[0][1]
            assert entry.logprob == pytest.approx(best, abs=1e-6), f"{entry} was chosen and is not the likeliest"

    @rule("sampling.temperature")
    async def test_greedy_whatever_else(self, target: Target) -> None:
        """At temperature 0 truncation and seed change nothing."""
        prompt = target.prompt(14, "whatever")
        greedy = (await target.generate(prompt)).tokens
        others: dict[str, Any] = {"top_p": 0.5, "top_k": 7, "min_p": 0.1, "seed": 3}
        others = {field: value for field, value in others.items() if field in target.can.sampling}
        assert (await target.generate(prompt, **others)).tokens == greedy

    @rule("sampling.temperature", "sampling.top_k")
    async def test_top_k_of_one(self, target: Target) -> None:
        """top_k=1 leaves the likeliest token only, whatever the temperature."""
        await self._is_greedy(target, top_k=1)

    @rule("sampling.temperature", "sampling.top_p")
    async def test_tiny_top_p(self, target: Target) -> None:
        """A tiny top_p leaves the likeliest token only: the smallest set that reaches it has one member."""
        await self._is_greedy(target, top_p=1e-6)

    @rule("sampling.temperature", "sampling.min_p")
    async def test_min_p_near_one(self, target: Target) -> None:
        """min_p near 1 leaves the likeliest token only."""
        await self._is_greedy(target, min_p=0.9999)

    @rule("sampling.temperature", "sampling.top_k", "sampling.seed", "logprobs")
    async def test_temperature_and_top_k_shape_the_draw(self, target: Target) -> None:
        """Tokens are drawn from the top_k likeliest, with probabilities to the power of 1/temperature."""
        prompt = target.prompt(11, "shape")
        likeliest = (await target.generate(prompt, 1, logprobs=TOP)).logprobs[0].top[: TOP - 2]
        for temperature in (0.25, 1.0, 3.0):
            drawn = await self._draw(target, prompt, temperature=temperature, top_k=len(likeliest))
            weights = {token: math.exp((p - likeliest[0][1]) / temperature) for token, p in likeliest}
            assert drawn.keys() <= weights.keys(), f"top_k={len(likeliest)} let through {drawn.keys() - weights.keys()}"
            chances = {token: weight / sum(weights.values()) for token, weight in weights.items()}
            for token, p in chances.items():
                allowed = SIGMAS * math.sqrt(p * (1 - p) / DRAWS) + 1 / DRAWS
                assert abs(drawn[token] / DRAWS - p) <= allowed, (
                    f"at temperature {temperature} token {token} came in {drawn[token]} of {DRAWS} draws; "
                    f"its probability is {p:.3f}"
                )
            # The mean sees what no single token shows.
            mean = sum(chances[token] * p for token, p in likeliest)
            variance = sum(chances[token] * (p - mean) ** 2 for token, p in likeliest)
            found = sum(drawn[token] * p for token, p in likeliest) / DRAWS
            assert abs(found - mean) <= SIGMAS * math.sqrt(variance / DRAWS) + 0.01, (
                f"at temperature {temperature} the tokens drawn have a mean log-probability of {found:.3f}, "
                f"expected {mean:.3f}: they are too {'likely' if found > mean else 'unlikely'}"
            )

    @rule("sampling.temperature", "sampling.top_p", "sampling.seed", "logprobs")
    async def test_top_p_keeps_the_nucleus(self, target: Target) -> None:
        """top_p keeps the smallest set of tokens whose probability reaches it, and no other token."""
        prompt = target.prompt(10, "nucleus")
        likeliest = (await target.generate(prompt, 1, logprobs=TOP)).logprobs[0].top
        reached = 0.0
        for size, (_, logprob) in enumerate(likeliest[:3], start=1):
            top_p, reached = reached + math.exp(logprob) / 2, reached + math.exp(logprob)
            drawn = await self._draw(target, prompt, temperature=1.0, top_p=top_p)
            allowed = {token for token, _ in likeliest[:size]}
            assert drawn.keys() <= allowed, f"top_p={top_p:.4f} is reached by {allowed} and let through {drawn.keys()}"
            assert len(drawn) == size or math.exp(logprob) / reached < 0.1, f"only {drawn.keys()} of {allowed} came"

    @rule("sampling.temperature", "sampling.min_p", "sampling.seed", "logprobs")
    async def test_min_p_drops_the_unlikely(self, target: Target) -> None:
        """min_p drops the tokens less likely than this fraction of the likeliest, and no other."""
        prompt = target.prompt(10, "floor")
        likeliest = (await target.generate(prompt, 1, logprobs=TOP)).logprobs[0].top
        for size in (1, 2, 3):
            between = (likeliest[size - 1][1] + likeliest[size][1]) / 2 - likeliest[0][1]
            drawn = await self._draw(target, prompt, temperature=1.0, min_p=min(math.exp(between), 0.9999))
            allowed = {token for token, _ in likeliest[:size]}
            assert drawn.keys() <= allowed, f"min_p={math.exp(between):.4f} let through {drawn.keys() - allowed}"

    @rule("sampling.seed")
    async def test_seed_repeats(self, target: Target) -> None:
        """A seeded request gives the same tokens again; 0 is a seed like any other."""
        prompt = target.prompt(13, "seeded")
        for seed in (0, 1, 2**31 - 1):
            first = await target.generate(prompt, 24, seed=seed, **_warm(target))
            assert (await target.generate(prompt, 24, seed=seed, **_warm(target))).tokens == first.tokens

    @rule("sampling.seed")
    async def test_seed_repeats_in_any_batch(self, target: Target) -> None:
        """A seeded request gives the same tokens whatever else is in its batch."""
        prompt = target.prompt(13, "seeded mate")
        seeded = {"seed": 7, **_warm(target)}
        alone = (await target.generate(prompt, 24, **seeded)).tokens
        for count in (1, 3, 6):
            mates = [target.ask(target.prompt(5 + 9 * i, f"{count} {i}"), 4 + 7 * i) for i in range(count)]
            mates += [target.ask(prompt, 30, seed=8, **_warm(target)), target.ask(prompt, 30, **_warm(target))]
            runs = await target.together([*mates, target.ask(prompt, 24, **seeded)])
            assert runs[-1].tokens == alone, f"other tokens beside {len(mates)} requests"

    @rule("sampling.seed", "sampling.temperature", "logprobs")
    async def test_draws_differ(self, target: Target) -> None:
        """Different seeds give different tokens, and so do requests without a seed."""
        prompt = target.prompt(13, "differ")
        probe = await target.generate(prompt, 12, logprobs=1)
        if all(math.exp(entry.logprob) > CERTAIN for entry in probe.logprobs):
            pytest.skip(f"the model is certain of every token: {probe.logprobs}")
        for what, seeds in (("seeds", range(8)), ("requests without a seed", [None] * 8)):
            runs = await target.together(target.ask(prompt, 12, temperature=1.5, seed=seed) for seed in seeds)
            assert len({tuple(run.tokens) for run in runs}) > 1, f"eight {what} gave one answer: {runs[0].tokens}"

    @rule("sampling.seed", "continues.seed")
    async def test_seeded_continuation(self, target: Target) -> None:
        """A seeded sequence goes on after prior_tokens as if it had never been interrupted."""
        prompt = target.prompt(12, "seeded continuation")
        whole = (await target.generate(prompt, 16, seed=11, **_warm(target))).tokens
        for cut in (1, 6, 15):
            more = {"seed": 11, "prior_tokens": cut, **_warm(target)}
            rest = await target.generate(prompt + whole[:cut], 16 - cut, **more)
            assert rest.tokens == whole[cut:], f"resumed after {cut} tokens"

    @rule("sampling.logit_bias")
    async def test_logit_bias_forces(self, target: Target) -> None:
        """A bias of +100 forces a token, greedy or sampled."""
        token = target.prompt(1, "forced")[0]
        for temperature in [0.0, 1.0] if target.greedy else [1.0]:
            run = await target.generate(target.prompt(8, "bias"), 5, logit_bias={token: 100.0}, temperature=temperature)
            assert run.tokens == [token] * 5

    @rule("sampling.logit_bias")
    async def test_logit_bias_bans(self, target: Target) -> None:
        """A bias of -100 bans a token, and several can be banned at once."""
        prompt = target.prompt(8, "ban")
        banned = set((await target.generate(prompt, 12)).tokens)
        run = await target.generate(prompt, 12, logit_bias=dict.fromkeys(banned, -100.0))
        assert not banned & set(run.tokens), f"banned tokens came: {banned & set(run.tokens)}"

    @rule("sampling.bad_token_sequences")
    async def test_bad_tokens(self, target: Target) -> None:
        """A forbidden sequence of one token never comes."""
        prompt = target.prompt(8, "bad token")
        for token in set((await target.generate(prompt, 12)).tokens):
            run = await target.generate(prompt, 12, bad_token_sequences=((token,),))
            assert token not in run.tokens

    @rule("sampling.bad_token_sequences")
    async def test_bad_sequences(self, target: Target) -> None:
        """A forbidden sequence never comes whole; its beginning may."""
        prompt = target.prompt(8, "bad sequence")
        plain = (await target.generate(prompt, 12)).tokens
        for length in (2, 3):
            bad = tuple(plain[:length])
            tokens = (await target.generate(prompt, 12, bad_token_sequences=(bad,))).tokens
            windows = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
            assert bad not in windows, f"{bad} came in {tokens}"
            assert tokens[: length - 1] == plain[: length - 1], f"more than the last token of {bad} was forbidden"

    async def _is_greedy(self, target: Target, **truncation: Any) -> None:
        prompt = target.prompt(16, "truncated")
        greedy = (await target.generate(prompt)).tokens
        assert (await target.generate(prompt, temperature=1.5, **truncation)).tokens == greedy

    async def _draw(self, target: Target, prompt: list[int], **sampling: Any) -> Counter[int]:
        """First tokens of `DRAWS` seeds."""
        runs = await target.together(target.ask(prompt, 1, seed=seed, **sampling) for seed in range(DRAWS))
        return Counter(run.tokens[0] for run in runs)


def _warm(target: Target) -> dict[str, float]:
    """Sampling in which a seed matters."""
    return {"temperature": 1.0} if target.greedy else {}
