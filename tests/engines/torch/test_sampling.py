"""Every sampling parameter does what `SamplingParams` says, and log-probabilities are the model's own."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.messages import FinishReason, SamplingParams, StopConditions
from tests.engines.torch.conftest import EOS, GREEDY, VOCAB, Engine, Running, generate, prompt_of

PROMPT = prompt_of(20)


def next_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """The model's logits [V] for the token after `tokens`."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0, -1].float()
    return logits


async def draw(running: Running, count: int, **params: Any) -> Counter[int]:
    """First tokens of `count` requests that differ in their seed alone."""
    jobs = [running.tokens(PROMPT, 1, SamplingParams(seed=seed, **params)) for seed in range(count)]
    return Counter(token for [token] in await asyncio.gather(*jobs))


def expect(model: Any, scores: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Probabilities [V] of the first token, end of sequence banned as `Running.request` asks for."""
    logits = next_logits(model, PROMPT)
    logits[EOS] = -torch.inf
    return torch.softmax(scores(logits), dim=-1)


def distance(found: Counter[int], expected: torch.Tensor) -> float:
    """Total variation between what was drawn and what was to be expected."""
    total = sum(found.values())
    return 0.5 * sum(abs(found[token] / total - float(p)) for token, p in enumerate(expected))


async def test_draws_follow_the_models_distribution(
    llama: Path, reference: Callable[[str], Any], engine: Engine
) -> None:
    """600 seeds at two temperatures; the wrong temperature is told apart by the same measure."""
    async with engine(llama) as running:
        found = {t: await draw(running, 600, temperature=t) for t in (0.5, 1.0)}
    expected = {t: expect(reference("llama"), lambda logits, t=t: logits / t) for t in (0.5, 1.0)}
    for t, other in ((0.5, 1.0), (1.0, 0.5)):
        assert distance(found[t], expected[t]) < 0.16
        assert distance(found[t], expected[other]) > distance(found[t], expected[t])


@pytest.mark.parametrize(
    "params", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 8, "top_p": 0.8, "min_p": 0.05}]
)
async def test_truncation_keeps_exactly_the_likeliest(
    params: dict[str, Any], llama: Path, reference: Callable[[str], Any], engine: Engine
) -> None:
    """What is drawn lies in the set that the definition gives, and every likely member of it is drawn."""
    temperature = 1.5
    probs = expect(reference("llama"), lambda logits: logits / temperature)
    order = [int(token) for token in probs.argsort(descending=True)]
    kept = [t for t in order if probs[t] >= params.get("min_p", 0) * probs[order[0]]]
    kept = kept[: params.get("top_k", VOCAB)]
    total, mass, allowed = float(probs[kept].sum()), 0.0, set()
    for token in kept:
        if mass / total >= params.get("top_p", 1):
            break
        allowed.add(token)
        mass += float(probs[token])
    async with engine(llama) as running:
        found = await draw(running, 300, temperature=temperature, **params)
    assert set(found) <= allowed
    assert {t for t in allowed if float(probs[t]) / mass > 0.05} <= set(found)
    assert 1 < len(allowed) < VOCAB // 2


async def test_top_p_over_more_than_the_first_candidates(llama: Path, engine: Engine, monkeypatch: Any) -> None:
    """Rows whose nucleus is larger than the first look are sorted whole: the same tokens come out."""
    wide = SamplingParams(temperature=3.0, top_p=0.97, seed=4)
    both = SamplingParams(temperature=3.0, top_p=0.97, top_k=200, seed=4)
    async with engine(llama) as running:
        expected = [await running.tokens(PROMPT, 20, sampling) for sampling in (wide, both)]
        monkeypatch.setattr("engines.torch.sampler.CANDIDATES", 8)
        narrow = SamplingParams(top_k=4, seed=1)
        found = await asyncio.gather(*(running.tokens(PROMPT, 20, sampling) for sampling in (wide, both, narrow)))
    assert found[:2] == expected


async def test_greedy_ignores_what_only_shapes_chance(llama: Path, engine: Engine) -> None:
    """Temperature 0 and top-k 1 are the arg-max, whatever else is set."""
    async with engine(llama) as running:
        expected = await running.tokens(PROMPT, 12)
        for params in (
            SamplingParams(temperature=0, top_p=0.1, top_k=50, min_p=0.2, seed=9),
            SamplingParams(temperature=1.7, top_k=1, seed=3),
            SamplingParams(temperature=1e-7),
        ):
            assert await running.tokens(PROMPT, 12, params) == expected


async def test_unseeded_requests_differ(llama: Path, engine: Engine) -> None:
    """Without a seed two equal requests are two draws."""
    async with engine(llama) as running:
        sampling = SamplingParams(temperature=2.0)
        found = await asyncio.gather(*(running.tokens(PROMPT, 12, sampling) for _ in range(4)))
    assert len({tuple(tokens) for tokens in found}) == 4


async def test_penalties_equal_their_definition(llama: Path, reference: Callable[[str], Any], engine: Engine) -> None:
    """A greedy run with penalties, replayed by hand on the reference's logits; batched with rows that have none."""
    sets: list[dict[str, float]] = [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"repetition_penalty": 1.4},
        {"presence_penalty": -0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    ]
    async with engine(llama) as running:
        jobs = [running.tokens(PROMPT, 16, SamplingParams(temperature=0, **params)) for params in sets]
        *found, plain = await asyncio.gather(*jobs, running.tokens(PROMPT, 16))
    assert plain == generate(reference("llama"), PROMPT, 16)
    assert all(tokens != plain for tokens in found)
    for params, tokens in zip(sets, found, strict=True):
        output: list[int] = []
        for token in tokens:
            logits = next_logits(reference("llama"), PROMPT + output)
            logits[EOS] = -torch.inf
            seen = sorted({*PROMPT, *output})
            factor = params.get("repetition_penalty", 1.0)
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
            for earlier, times in Counter(output).items():
                logits[earlier] -= params.get("frequency_penalty", 0) * times + params.get("presence_penalty", 0)
            assert token == int(logits.argmax())
            output.append(token)


async def test_logit_bias_bans_and_forces(llama: Path, engine: Engine) -> None:
    """-100 bans the arg-max, +100 forces a token."""
    async with engine(llama) as running:
        [likeliest] = await running.tokens(PROMPT, 1)
        banned = SamplingParams(temperature=0, logit_bias={likeliest: -100.0})
        assert await running.tokens(PROMPT, 1, banned) != [likeliest]
        forced = SamplingParams(temperature=1, seed=1, logit_bias={77: 100.0})
        assert await running.tokens(PROMPT, 5, forced) == [77] * 5


async def test_bad_sequences_never_come(llama: Path, engine: Engine) -> None:
    """A pair is broken up at its second token, which stays allowed elsewhere; a prompt's end completes no pair."""
    async with engine(llama) as running:
        plain = await running.tokens(PROMPT, 10)
        pair = (plain[3], plain[4])
        found = await running.tokens(PROMPT, 10, SamplingParams(temperature=0, bad_token_sequences=(pair,)))
        assert found[:4] == plain[:4]
        assert all((a, b) != pair for a, b in itertools.pairwise(found))
        across = SamplingParams(temperature=0, bad_token_sequences=((PROMPT[-1], plain[0]),))
        assert (await running.tokens(PROMPT, 1, across)) == plain[:1]
        single = SamplingParams(temperature=0, bad_token_sequences=((plain[0],),))
        assert plain[0] not in await running.tokens(PROMPT, 10, single)


async def test_stop_conditions(llama: Path, engine: Engine) -> None:
    """Stop tokens and end of sequence end the stream and are named; min_tokens and ignore_eos hold them off."""
    force_eos = SamplingParams(temperature=0, logit_bias={EOS: 50.0})
    async with engine(llama) as running:
        plain = await running.tokens(PROMPT, 10)
        at = plain.index(plain[4])

        async def last(sampling: SamplingParams, **stop: Any) -> tuple[list[int], Any, Any]:
            stop.setdefault("max_tokens", 10)
            deltas = await running.deltas(running.request(PROMPT, sampling=sampling, stop=StopConditions(**stop)))
            return [t for d in deltas for t in d.token_ids], deltas[-1].finish, deltas[-1].stop_token

        stop_ids = (plain[4], 9999)  # an id that does not exist is never met
        assert await last(GREEDY, stop_token_ids=stop_ids) == (plain[: at + 1], FinishReason.STOP, plain[4])
        tokens, *_ = await last(GREEDY, stop_token_ids=stop_ids, min_tokens=8)
        assert plain[4] not in tokens[:8]
        assert await last(force_eos) == ([EOS], FinishReason.STOP, EOS)
        tokens, finish, stopped = await last(force_eos, min_tokens=4)
        assert (len(tokens), EOS in tokens[:4], finish, stopped) == (5, False, FinishReason.STOP, EOS)
        assert await last(force_eos, ignore_eos=True, max_tokens=3) == ([EOS] * 3, FinishReason.LENGTH, None)
        assert await last(force_eos, ignore_eos=True, stop_token_ids=(EOS,)) == ([EOS], FinishReason.STOP, EOS)


async def test_logprobs_are_the_models_own(llama: Path, reference: Callable[[str], Any], engine: Engine) -> None:
    """Values, ranks and alternatives equal log-softmax of the reference's logits, whatever shapes the sampling."""
    sampling = SamplingParams(temperature=2.0, seed=2, top_k=30, logit_bias={5: 3.0}, presence_penalty=1.0)
    async with engine(llama) as running:
        jobs = [running.deltas(running.request(PROMPT, 6, sampling, logprobs=n)) for n in (0, 4)]
        found = [
            *await asyncio.gather(*jobs, running.deltas(running.request(PROMPT, 6))),
        ]
    assert all(delta.logprobs is None for delta in found[2])
    for deltas, top in zip(found[:2], (0, 4), strict=True):
        tokens: list[int] = []
        for logprob in [entry for delta in deltas for entry in delta.logprobs or []]:
            expected = torch.log_softmax(next_logits(reference("llama"), PROMPT + tokens), dim=-1)
            assert logprob.logprob == pytest.approx(float(expected[logprob.token_id]), abs=2e-4)
            assert logprob.rank == int((expected > expected[logprob.token_id]).sum()) + 1
            best = expected.topk(top)
            assert [token for token, _ in logprob.top] == best.indices.tolist()
            assert [value for _, value in logprob.top] == pytest.approx(best.values.tolist(), abs=2e-4)
            tokens.append(logprob.token_id)
        assert tokens == [t for delta in deltas for t in delta.token_ids]


@pytest.mark.parametrize("budget", [16, 512])
async def test_prompt_logprobs(budget: int, llama: Path, reference: Callable[[str], Any], engine: Engine) -> None:
    """One a prompt token, the first None, computed even when the prompt is cached, and over any number of chunks."""
    prompt = prompt_of(70)
    with torch.inference_mode():
        expected = torch.log_softmax(reference("llama")(torch.tensor([prompt])).logits[0].float(), dim=-1)
    async with engine(llama, max_num_batched_tokens=budget) as running:
        await running.tokens(prompt, 4)
        first, *rest = await running.deltas(running.request(prompt, 4, prompt_logprobs=2))
        again = await running.deltas(running.request(prompt, 1))
        await running.idle()
    assert first.cached_tokens == 0
    assert again[0].cached_tokens == 64
    assert all(delta.prompt_logprobs is None for delta in rest)
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == len(prompt)
    for position, entry in enumerate(first.prompt_logprobs[1:]):
        assert entry is not None
        assert entry.token_id == prompt[position + 1]
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=2e-4)
        assert [token for token, _ in entry.top] == expected[position].topk(2).indices.tolist()


async def test_prompt_logprobs_survive_preemption(llama: Path, engine: Engine) -> None:
    """A prompt that is computed in parts, preempted and computed again, reports each position once."""
    prompts = [prompt_of(60, seed) for seed in range(4)]
    async with engine(llama, block_size=4, num_kv_blocks=30, max_num_batched_tokens=16) as running:
        jobs = [running.deltas(running.request(prompt, 30, prompt_logprobs=0)) for prompt in prompts]
        for prompt, deltas in zip(prompts, await asyncio.gather(*jobs), strict=True):
            entries = deltas[0].prompt_logprobs
            assert entries is not None
            assert [entry.token_id for entry in entries if entry is not None] == prompt[1:]
        assert running.engine.num_preemptions > 0
        await running.idle()
