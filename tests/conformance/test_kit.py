"""The kit itself: a rule that is broken is found, by its own test and with a sentence that says what is wrong."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from dynamo import Delta, TokenLogprob
from dynamo.testing import EngineConformance
from dynamo.testing.kit import Kit
from tests.conformance import faults
from tests.conformance.faults import altering, ignoring, miscounting, replace, telling, twisting


def _logprobs(change: Any) -> type:
    """An engine with changed log-probabilities."""

    def twist(request: Any, number: int, delta: Delta) -> list[Delta]:
        return [replace(delta, logprobs=delta.logprobs and [change(entry) for entry in delta.logprobs])]

    return twisting(twist)


def _prompt_logprobs(change: Any) -> type:
    def twist(request: Any, number: int, delta: Delta) -> list[Delta]:
        return [replace(delta, prompt_logprobs=delta.prompt_logprobs and change(delta.prompt_logprobs))]

    return twisting(twist)


def _swapped(entry: TokenLogprob) -> TokenLogprob:
    return TokenLogprob(entry.token_id, entry.logprob, entry.rank, entry.top[::-1])


def _number(request: Any) -> int:
    """Differs from one of the kit's requests to the next."""
    return int(request.request_id.rsplit("-", 1)[1])


FAULTS: list[tuple[type, str, str]] = [
    # Streams
    (
        altering(lambda r: replace(r, stop=replace(r.stop, max_tokens=r.stop.max_tokens + 1))),
        "exactly_max_tokens",
        "max_",
    ),
    (altering(lambda r: replace(r, stop=replace(r.stop, max_tokens=1))), "exactly_max_tokens", "len"),
    (twisting(lambda r, n, d: [replace(d, finish=None)]), "exactly_max_tokens", "without a terminal delta"),
    (twisting(lambda r, n, d: [d, Delta([])] if d.finish else [d]), "exactly_max_tokens", "after the terminal one"),
    (twisting(lambda r, n, d: [Delta([])] * 9 + [d]), "exactly_max_tokens", "a flood"),
    (
        twisting(lambda r, n, d: [replace(d, token_ids=[t + 10**6 for t in d.token_ids])]),
        "one_token_prompt",
        "vocabulary",
    ),
    (twisting(lambda r, n, d: [replace(d, cached_tokens=0)]), "exactly_max_tokens", "first delta only"),
    (twisting(lambda r, n, d: [replace(d, token_ids=[t ^ _number(r) % 8 for t in d.token_ids])]), "repeatable", "=="),
    (faults.Moody, "batch_mates_change_nothing", "=="),
    (faults.Blocking, "event_loop_stays_free", "stood still"),
    (faults.Stuck, "one_token_prompt", "blocks the event loop"),
    (faults.Silent, "one_token_prompt", "in vain"),
    (twisting(lambda r, n, d: [replace(d, logprobs=[])]), "one_token_prompt", "nobody asked for"),
    # Sampling
    (
        altering(lambda r: replace(r, sampling=replace(r.sampling, temperature=1.0))),
        "greedy_is_arg_max",
        "not the likel",
    ),
    (ignoring("temperature"), "temperature_and_top_k_shape_the_draw", "its probability is|they are too"),
    (ignoring("top_k"), "top_k_of_one", "=="),
    (ignoring("top_k"), "temperature_and_top_k_shape_the_draw", "let through"),
    (ignoring("top_p"), "tiny_top_p", "=="),
    (ignoring("top_p"), "top_p_keeps_the_nucleus", "let through"),
    (ignoring("min_p"), "min_p_near_one", "=="),
    (ignoring("min_p"), "min_p_drops_the_unlikely", "let through"),
    (ignoring("seed"), "seed_repeats", "=="),
    (ignoring("seed"), "seed_repeats_in_any_batch", "other tokens"),
    (altering(lambda r: replace(r, sampling=replace(r.sampling, seed=5))), "draws_differ", "gave one answer"),
    (ignoring("logit_bias"), "logit_bias_forces", "=="),
    (ignoring("logit_bias"), "logit_bias_bans", "banned tokens came"),
    (ignoring("bad_token_sequences"), "bad_tokens", "not in"),
    (ignoring("bad_token_sequences"), "bad_sequences", "came in"),
    (ignoring("presence_penalty"), "presence_penalty", "has to be"),
    (ignoring("frequency_penalty"), "frequency_penalty", "has to be"),
    (ignoring("repetition_penalty"), "repetition_penalty", "was chosen|changed no token"),
    # Continuation
    (ignoring("prior_tokens"), "seeded_continuation", "resumed"),
    (ignoring("prior_tokens"), "penalised_continuation", "resumed"),
    (ignoring("prior_tokens"), "constrained_continuation", "resumed"),
    (ignoring("prior_tokens"), "min_tokens_count_prior_tokens", "=="),
    # Stop conditions
    (ignoring("stop_token_ids"), "stop_tokens", "STOP"),
    (ignoring("stop_token_ids"), "any_of_several_stop_tokens", "STOP"),
    (ignoring("min_tokens"), "min_tokens_hold_back_stop_tokens", ">="),
    (ignoring("min_tokens"), "min_tokens_hold_back_end_of_sequence", "came before"),
    (ignoring("ignore_eos"), "end_of_sequence", "=="),
    (altering(lambda r: replace(r, stop=replace(r.stop, ignore_eos=True))), "end_of_sequence", "=="),
    (twisting(lambda r, n, d: [replace(d, stop_token=None)]), "stop_tokens", "=="),
    (
        twisting(lambda r, n, d: [replace(d, token_ids=d.token_ids[:-1])] if d.stop_token else [d]),
        "stop_tokens",
        "last id",
    ),
    # Log-probabilities
    (_logprobs(_swapped), "entries_are_consistent", "likeliest comes first"),
    (_logprobs(lambda e: TokenLogprob(e.token_id, e.logprob, 7, e.top)), "entries_are_consistent", "rank 7"),
    (
        _logprobs(lambda e: TokenLogprob(e.token_id, e.logprob, e.rank, e.top[1:])),
        "entries_are_consistent",
        "likeliest",
    ),
    (_logprobs(lambda e: TokenLogprob(e.token_id, e.logprob + 9, e.rank, e.top)), "entries_are_consistent", "above 0"),
    (
        twisting(lambda r, n, d: [replace(d, logprobs=None)]),
        "fewer_are_the_beginning_of_more",
        "log-probabilities are of",
    ),
    (faults.MinusSign, "temperature_does_not_show", "approx|missing"),
    (_prompt_logprobs(lambda entries: entries[1:]), "prompt_logprobs", "entries for"),
    (_prompt_logprobs(lambda entries: entries[:2] + entries[1:-1]), "prompt_logprobs", "token_id"),
    # Structured output
    *(
        (ignoring("constraint"), rule, "complete|Expecting|None|in ")
        for rule in ("json_schema", "json_object", "regex", "grammar", "choice")
    ),
    (ignoring("constraint"), "senseless_constraints", "DID NOT RAISE"),
    # Aborts
    (faults.Forgetful, "abort_at_the_first_moment", "aborted, it ended with"),
    (faults.Forgetful, "abort_while_waiting", "aborted, it ended with"),
    (faults.Forgetful, "abort_during_prefill", "aborted, it ended with"),
    (faults.Forgetful, "abort_while_generating", "aborted, it ended with"),
    (faults.Deaf, "closing_the_stream", "it went on|not freed"),
    (faults.Deaf, "cancelling_the_consumer", "it went on|not freed"),
    (faults.Leaky, "cancellation_storm", "something is not freed"),
    # Load
    (miscounting(lambda n: replace(n, running=n.running * 2)), "load_counts_requests", "the load shows"),
    (miscounting(lambda n: replace(n, kv_blocks_used=0)), "load_counts_blocks", "five blocks"),
    (miscounting(lambda n: replace(n, kv_blocks_used=n.kv_blocks_used * 99)), "load_counts_blocks", "hold the whole"),
    (miscounting(lambda n: replace(n, kv_blocks_total=n.kv_blocks_total + n.running)), "load_counts_blocks", "=="),
    (
        miscounting(lambda n: replace(n, running=n.running + n.waiting, waiting=0)),
        "load_counts_waiting",
        "max_num_seqs is",
    ),
    (miscounting(lambda n: replace(n, waiting=n.waiting + 1)), "one_token_prompt", "something is not freed"),
    # Prefix cache
    (ignoring("cache_salt"), "salt_separates", "salt bob"),
    (twisting(lambda r, n, d: [replace(d, cached_tokens=None)]), "repeated_prompt", "None"),
    (twisting(lambda r, n, d: [replace(d, cached_tokens=d.cached_tokens and 16)]), "conversation", "=="),
    (telling(lambda b: replace(b, sequence=b.sequence * 2)), "events_tell_what_is_reused", "without gaps"),
    (
        telling(lambda b: replace(b, events=b.events[:-1])),
        "events_tell_what_is_reused",
        "KV events tell|events promised",
    ),
    (telling(faults.without_salt), "events_tell_what_is_reused", "events promised|KV events tell"),
    (telling(faults.without_removals), "eviction", "events tell of|events promised"),
    (faults.Amnesic, "late_listener", "KV events tell"),
    # Full engines
    (faults.Impatient, "full_cache_loses_nothing", "=="),
    (ignoring("priority"), "priority", "of priority 0 were served"),
    (faults.Rushing, "drain", "drain returned before"),
    # Life cycle
    (faults.Littering, "stop_frees_and_restarts", "left running"),
    (faults.Fragile, "stop_without_start", "NoneType"),
    (faults.Lax, "unknown_engine_argument", "DID NOT RAISE"),
    (faults.Generous, "facts_are_consistent", "wait for ever"),
    (faults.Sick, "health", "busy"),
    (faults.Fickle, "describing_is_constant", "=="),
]


@pytest.mark.parametrize(("engine", "rule", "says"), FAULTS, ids=[f"{i}-{f[1]}" for i, f in enumerate(FAULTS)])
def test_fault_is_found(engine: type, rule: str, says: str, tiny_model: Path) -> None:
    """An engine that breaks a rule fails that rule's test, and the failure says how."""
    config = {"model": str(tiny_model), "dtype": "float32", "device": "cpu", "max_model_len": 512, "block_size": 16}
    settings = {"engine": engine, "step_timeout": 4.0, "test_timeout": 2.0 if engine is faults.Stuck else 30.0}
    settings["stall_limit"] = 0.8
    kind: type[EngineConformance] = type("Faulty", (EngineConformance,), settings)
    kit = kind.kit = Kit(kind, config)
    try:
        test = getattr(kind(), f"test_{rule}")
        fixtures = {}
        if "target" in inspect.signature(test).parameters:
            fixtures["target"] = kit.run(kit.shared())
        if "cramped" in inspect.signature(test).parameters:
            fixtures["cramped"] = kit.run(kit.cramped())
        with pytest.raises((Exception, pytest.fail.Exception), match=says):
            test(**fixtures)
    finally:
        kit.close()
