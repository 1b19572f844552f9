"""Prefill here or elsewhere, why, and how that is changed while serving."""

from __future__ import annotations

import msgspec
import pytest

from core.messages import ConfigError
from core.prefill.decision import DisaggPolicy
from core.prefill.queue import QueueUnavailable
from core.prefill.settings import DisaggSettings

CONDITIONAL = {"remote-prefill": True, "conditional-disagg": True}


def depth(value: int):
    async def ask() -> int:
        return value

    return ask


async def never() -> int:
    raise AssertionError("the queue was asked for nothing")


@pytest.mark.parametrize(
    ("prompt", "cached", "waiting", "remote", "reason"),
    [
        (1001, 0, 0, True, "Remote: 1001 uncached tokens are more than max-local-prefill-length, 1000, and 0 waiting"),
        (1000, 0, 0, False, "Local: 1000 uncached tokens are not more than max-local-prefill-length, 1000."),
        (3000, 2000, 0, False, "Local: 1000 uncached tokens are not more"),
        (3000, 1999, 2, True, "2 waiting tasks are fewer than max-prefill-queue-size, 3."),
        (3000, 0, 3, False, "Local: .* 3 waiting tasks are not fewer than max-prefill-queue-size, 3."),
    ],
)
async def test_conditional_disaggregation(prompt, cached, waiting, remote, reason):
    decision = await DisaggPolicy(DisaggSettings.of(CONDITIONAL)).decide(prompt, cached, depth(waiting))
    assert decision.remote is remote
    assert decision.uncached_tokens == prompt - cached
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(decision.reason)
    assert decision.queue_depth == (waiting if prompt - cached > 1000 else None)
    assert msgspec.json.decode(msgspec.json.encode(decision))["max_local_prefill_length"] == 1000


@pytest.mark.parametrize("key", ["remote-prefill", "remote_prefill", "enable-disaggregated-prefill"])
async def test_without_conditions_every_prompt_goes_elsewhere(key):
    decision = await DisaggPolicy(DisaggSettings.of({key: True})).decide(1, 0, never)
    assert decision.remote
    assert not decision.conditional


async def test_off_means_off_and_nothing_to_compute_means_here():
    assert not (await DisaggPolicy(DisaggSettings()).decide(9999, 0, never)).remote
    assert not (await DisaggPolicy(DisaggSettings.of({"remote-prefill": True})).decide(64, 64, never)).remote


async def test_a_queue_that_cannot_be_reached_means_here():
    async def broken() -> int:
        raise QueueUnavailable("The prefill queue cannot be reached.")

    decision = await DisaggPolicy(DisaggSettings.of(CONDITIONAL)).decide(5000, 0, broken)
    assert not decision.remote
    assert decision.reason == "Local: The prefill queue cannot be reached."


async def test_a_change_applies_to_the_next_request_and_none_restores():
    policy = DisaggPolicy(DisaggSettings.of(CONDITIONAL))
    policy.reconfigure({"max-local-prefill-length": 10, "max_prefill_queue_size": 1})
    assert (await policy.decide(11, 0, depth(0))).remote
    assert not (await policy.decide(11, 0, depth(1))).remote
    policy.reconfigure({"max-local-prefill-length": None})
    assert not (await policy.decide(11, 0, depth(0))).remote
    assert policy.settings.max_prefill_queue_size == 1
    policy.restore()
    assert policy.settings == DisaggSettings.of(CONDITIONAL)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max-local-prefill-length": -1}, "max-local-prefill-length is -1; it must be at least 0"),
        ({"max-local-prefill-length": "many"}, "Expected `int`, got `str` - at `\\$.max-local-prefill-length`"),
        ({"kv-lease": 5}, "'kv-lease' cannot be changed while serving"),
        ({"remote-prefill": False, "nonsense": 1}, "'nonsense' cannot be changed"),
    ],
)
def test_a_bad_change_changes_nothing(values, sentence):
    policy = DisaggPolicy(DisaggSettings.of(CONDITIONAL))
    with pytest.raises(ConfigError, match=sentence):
        policy.reconfigure(values)
    assert policy.settings == DisaggSettings.of(CONDITIONAL)


async def test_changes_are_followed_and_bad_ones_do_not_stop_that(caplog):
    policy = DisaggPolicy(DisaggSettings.of(CONDITIONAL))
    seen = []

    async def changes():
        for change in (
            b'{"max-local-prefill-length": 5}',
            b"not json",
            b'{"bad": 1}',
            b'{"max-prefill-queue-size": 9}',
        ):
            yield change
            seen.append(policy.settings.max_local_prefill_length)
        yield None

    await policy.follow(changes())
    assert seen == [5, 5, 5, 5]
    assert policy.settings == DisaggSettings.of(CONDITIONAL)
    assert caplog.text.count("is not applied") == 2


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max-local-prefil-length": 1}, "did you mean 'max-local-prefill-length'"),
        ({"prefill-timeout": 0}, "prefill-timeout is 0; it must be above 0 seconds"),
        ({"kv-lease": -3}, "kv-lease is -3 s; it must be above 0"),
        ({"prefill-attempts": 0}, "max-attempts is 0; it must be at least 1"),
        ({"prefill-fallback": "maybe"}, "Invalid enum value 'maybe'"),
    ],
)
def test_bad_configuration_is_refused_with_a_sentence(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        DisaggSettings.of(values)
