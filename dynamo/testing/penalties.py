"""Penalties: what a greedy run chooses is worked out from the model's own log-probabilities and the tokens so far."""

from __future__ import annotations

from collections import Counter

from dynamo import TokenLogprob
from dynamo.testing.kit import Conformance
from dynamo.testing.rule import rule
from dynamo.testing.run import Run
from dynamo.testing.sampling import TOP
from dynamo.testing.target import Target

CLEAR = 0.01
"""Lead in log-probability from which one token is certain to be preferred to another."""
LENGTH = 24


class Penalties(Conformance):
    """Rules about presence, frequency and repetition penalties."""

    @rule("sampling.presence_penalty", "sampling.temperature", "logprobs")
    async def test_presence_penalty(self, target: Target) -> None:
        """The presence penalty is subtracted once from every token that was generated before."""
        for penalty in (2.0, 0.5, -2.0):
            await self._predictable(target, presence=penalty)

    @rule("sampling.frequency_penalty", "sampling.temperature", "logprobs")
    async def test_frequency_penalty(self, target: Target) -> None:
        """The frequency penalty is subtracted once for every time that a token was generated."""
        for penalty in (2.0, 0.5, -2.0):
            await self._predictable(target, frequency=penalty)

    @rule("sampling.repetition_penalty", "sampling.temperature", "logprobs")
    async def test_repetition_penalty(self, target: Target) -> None:
        """The repetition penalty lowers the tokens of prompt and output, and leaves the others as they are."""
        changed = 0
        for key in ("repeat a", "repeat b", "repeat c", "repeat d"):
            prompt = target.prompt(8, key)
            prompt += (await target.generate(prompt, 8)).tokens
            plain = (await target.generate(prompt, LENGTH)).tokens
            run = await target.generate(prompt, LENGTH, repetition_penalty=2.0, logprobs=TOP)
            changed += run.tokens != plain
            seen = set(prompt)
            for entry in run.logprobs:
                _check_repetition(entry, seen)
                seen.add(entry.token_id)
        assert changed, "a repetition penalty of 2 changed no token of four answers"

    @rule("sampling.presence_penalty", "sampling.frequency_penalty", "continues.penalties")
    async def test_penalised_continuation(self, target: Target) -> None:
        """Penalties count prior_tokens as output: a sequence goes on as if it had never been interrupted."""
        prompt = target.prompt(12, "penalised continuation")
        for strength in (1.5, -2.0):
            penalties = {"presence_penalty": strength, "frequency_penalty": strength}
            whole = (await target.generate(prompt, LENGTH, **penalties)).tokens
            for cut in (1, 9, LENGTH - 1):
                rest = await target.generate(prompt + whole[:cut], LENGTH - cut, prior_tokens=cut, **penalties)
                assert rest.tokens == whole[cut:], f"resumed after {cut} tokens with penalties of {strength}"

    async def _predictable(self, target: Target, *, presence: float = 0.0, frequency: float = 0.0) -> None:
        prompt = target.prompt(14, f"penalty {presence} {frequency}")
        run = await target.generate(
            prompt, LENGTH, presence_penalty=presence, frequency_penalty=frequency, logprobs=TOP
        )
        decided = [p for p in _predictions(run, presence, frequency) if p is not None]
        assert decided, "nothing could be decided: the likeliest tokens are too close together"
        for position, expected, entry in decided:
            assert entry.token_id == expected, (
                f"with presence penalty {presence} and frequency penalty {frequency} token {position} has to be "
                f"{expected}, found {entry.token_id}; before it came {run.tokens[:position]}, likeliest are {entry.top}"
            )


def _predictions(run: Run, presence: float, frequency: float) -> list[tuple[int, int, TokenLogprob] | None]:
    """For each position what has to be chosen, None where the likeliest tokens do not decide it."""
    counts: Counter[int] = Counter()
    predictions: list[tuple[int, int, TokenLogprob] | None] = []
    for position, entry in enumerate(run.logprobs):
        scores = {t: p - presence * (counts[t] > 0) - frequency * counts[t] for t, p in entry.top}
        first, second = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
        # Tokens beyond the likeliest are at most as likely as the last of those, unless a negative penalty lifts them.
        lift = max([0.0, *(-presence - frequency * n for t, n in counts.items() if t not in scores)])
        lead = scores[first] - max(scores[second], entry.top[-1][1] + lift)
        predictions.append((position, first, entry) if lead > CLEAR else None)
        counts[entry.token_id] += 1
    return predictions


def _check_repetition(entry: TokenLogprob, seen: set[int]) -> None:
    fresh = [(token, p) for token, p in entry.top if token not in seen]
    best = entry.top[0]
    if fresh and fresh[0] == best and best[1] - entry.top[1][1] > CLEAR:
        assert entry.token_id == best[0], f"{best} is the likeliest and new, and {entry.token_id} was chosen"
    if fresh and entry.token_id not in seen:
        lead = fresh[0][1] - entry.logprob
        assert lead < CLEAR, f"{entry.token_id} was chosen over the likelier {fresh[0]}, both new"
