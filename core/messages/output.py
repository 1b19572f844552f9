"""What an engine answers: a stream of deltas that ends in exactly one terminal delta or one typed error."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """The model's end-of-sequence token, a stop token, or a constraint that was complete."""
    LENGTH = "length"
    """`max_tokens`, or the model's longest sequence."""
    ABORT = "abort"
    """`abort()` was called for the request; the tokens so far were delivered."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token under the model's own distribution.

    That is before logit bias, bans, the constraint, penalties, temperature and truncation: it depends on the tokens
    before it and on nothing else.
    """

    token_id: int
    logprob: float
    rank: int | None
    """1 for the likeliest token. None when the token is not in `top` and the engine does not count further."""
    top: list[tuple[int, float]] = []
    """The likeliest tokens at this position, likeliest first, as (token id, log-probability)."""


class Delta(msgspec.Struct, omit_defaults=True, gc=False):
    """What is new in a sequence since the previous delta. One or several tokens: consumers iterate, never assume one.

    The last delta of a stream has `finish` set, and only that one. A delta without tokens is allowed (for example a
    terminal one after an abort).
    """

    token_ids: list[int]
    finish: FinishReason | None = None
    stop_token: int | None = None
    """With `FinishReason.STOP`: the end-of-sequence or stop token that ended the sequence, also the last id of
    `token_ids`. None when a constraint was complete."""
    logprobs: list[TokenLogprob] | None = None
    """As many as `token_ids`, when the request asked for them."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """First delta only, when asked for: one per prompt token, the first of them None."""
    cached_tokens: int | None = None
    """First delta only: how many prompt tokens were not computed because their KV blocks were at hand."""
    decision: bytes | None = None
    """First delta only, set by a Router when `RequestContext.explain` asks for it: its decision, as JSON."""


class PrefillResult(msgspec.Struct, frozen=True):
    """What `prefill` leaves behind."""

    session: str
    """Names the held KV for `export_kv` and `release_kv`; unique within the worker."""
    first: Delta
    """The first generated token, as the stream would have delivered it. Terminal if the sequence ended with it."""
