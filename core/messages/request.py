"""What an engine is asked to do: token ids in, sampling, stop conditions, constraint.

Text never crosses this door. The processor turns messages into token ids, and stop *strings*, tool calls and
reasoning are found in the text that the core detokenizes, so that they behave the same on every engine.
One request is one sequence: the processor fans `n` choices out into `n` requests that share their prompt.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Defaults change nothing: the model's own distribution.

    Order of application, the same on every engine: logit bias, bans and the constraint; penalties; temperature;
    min-p, top-k, top-p.
    """

    temperature: float = 1.0
    """0 is greedy: the arg-max, whatever the other fields say."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this, in (0, 1]."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the likeliest, in [0, 1)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that was generated before, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted once for every time the token was generated, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides (positive) or multiplies (negative) logits of tokens seen in prompt or output; 1 is off."""
    seed: int | None = None
    """Makes the request repeatable on the same engine, whatever else is in its batch."""
    logit_bias: dict[int, float] = {}
    """Token id to a number added to its logit; -100 bans, +100 forces."""
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()
    """Sequences of token ids that must never be generated."""


class StopConditions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When a sequence ends. Stop strings are not here: the core finds them and aborts the engine."""

    max_tokens: int
    """At most this many tokens are generated, at least 1. The core has already clipped it to the model's length."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens cannot be chosen before this many tokens were generated."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence. The matched one is the last id of the stream and is named in `Delta.stop_token`."""
    ignore_eos: bool = False
    """Go on past the model's own end-of-sequence tokens; `stop_token_ids` still end the sequence."""


class ConstraintKind(StrEnum):
    """Languages in which structured output can be asked for."""

    JSON_SCHEMA = "json_schema"
    """`Constraint.value` is a JSON schema, as JSON text."""
    JSON_OBJECT = "json_object"
    """Any JSON object; `Constraint.value` is empty."""
    REGEX = "regex"
    """The whole output matches this regular expression."""
    GRAMMAR = "grammar"
    """A context-free grammar in Lark (or GBNF) syntax."""
    CHOICE = "choice"
    """`Constraint.value` is a JSON array of strings: the output is exactly one of them."""


class Constraint(msgspec.Struct, frozen=True):
    """Structured output: the tokens generated must spell a text of this language."""

    kind: ConstraintKind
    value: str = ""


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate."""

    request_id: str
    """Unique among everything running in the deployment; names the request in logs, aborts and KV sessions."""
    token_ids: list[int]
    """The prompt, at least one id, each in [0, vocab_size). Followed by `prior_tokens` already generated."""
    stop: StopConditions
    sampling: SamplingParams = SamplingParams()
    prior_tokens: int = 0
    """How many of the last `token_ids` were *generated* by an earlier attempt (migration, or the prefill side).

    They count as output for penalties, `min_tokens`, the seed's position and the constraint, and are not emitted
    again. `stop.max_tokens` counts only what is still to come.
    """
    logprobs: int | None = None
    """None: no log-probabilities. N: of every generated token, and of the N likeliest beside it."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for the prompt; delivered with the first delta."""
    constraint: Constraint | None = None
    lora: str | None = None
    """Name of a loaded LoRA adapter."""
    cache_salt: str | None = None
    """Requests share prefix-cache blocks only within the same salt."""
    priority: int = 0
    """Larger is served first among waiting requests, on every engine."""
    data_parallel_rank: int | None = None
    """The rank that must take the request; None lets the engine choose."""
