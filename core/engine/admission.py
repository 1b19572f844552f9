"""What a request may ask of a started engine: the checks that are the same for every engine, made once, by the core.

They run before the adapter sees the request, so that no adapter repeats them, none forgets one, and nothing that an
engine cannot do is silently left out.
"""

from __future__ import annotations

from typing import Any

import msgspec

from core.messages import (
    Continuation,
    EngineDescription,
    EngineInfo,
    EngineRequest,
    RequestRejected,
    SamplingParams,
)

MOST_LOGPROBS = 20
"""Likeliest tokens that can be asked for: what OpenAI's interface allows, and what engines give without being told."""

_PLAIN = SamplingParams()


class Admission:
    """The gate of one started engine. Cheap: a few comparisons, and one pass over the prompt in C."""

    def __init__(self, description: EngineDescription, info: EngineInfo) -> None:
        self._name = description.name
        self._capabilities = description.capabilities
        self._info = info
        self._undeclared = tuple(
            (field, getattr(_PLAIN, field))
            for field in SamplingParams.__struct_fields__
            if field not in description.capabilities.sampling
        )

    def admit(self, request: EngineRequest) -> EngineRequest:
        """The request as the adapter gets it: `max_tokens` clipped to what fits behind the prompt.

        Raises: `RequestRejected`, naming the OpenAI parameter at fault where there is one.
        """
        self._check_prompt(request)
        self._check_stop(request)
        if request.sampling is not _PLAIN and request.sampling != _PLAIN:
            self._check_sampling(request.sampling)
        self._check_extras(request)
        if request.prior_tokens:
            self._check_continuation(request)
        room = self._info.max_model_len - len(request.token_ids)
        if request.stop.max_tokens > room:
            stop = msgspec.structs.replace(request.stop, max_tokens=room)
            return msgspec.structs.replace(request, stop=stop)
        return request

    def _check_prompt(self, request: EngineRequest) -> None:
        tokens, info = request.token_ids, self._info
        if not tokens:
            raise RequestRejected("The prompt is empty; it needs at least one token.", param="prompt")
        if len(tokens) >= info.max_model_len:
            raise RequestRejected(
                f"The prompt has {len(tokens)} tokens and the model's longest sequence, prompt and answer together, "
                f"is {info.max_model_len}: shorten the prompt.",
                param="prompt",
                code="context_length_exceeded",
            )
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= info.vocab_size:
            wrong = low if low < 0 else high
            raise RequestRejected(
                f"Token id {wrong} in the prompt is outside the vocabulary, 0 to {info.vocab_size - 1}: "
                "tokenize with this model's tokenizer.",
                param="prompt",
            )

    def _check_stop(self, request: EngineRequest) -> None:
        stop = request.stop
        if stop.max_tokens < 1:
            raise RequestRejected(f"max_tokens is {stop.max_tokens}; it must be at least 1.", param="max_tokens")
        if stop.min_tokens < 0:
            raise RequestRejected(f"min_tokens is {stop.min_tokens}; it must be 0 or more.", param="min_tokens")

    def _check_sampling(self, sampling: SamplingParams) -> None:
        for field, default in self._undeclared:
            if getattr(sampling, field) != default:
                raise self._refusal(f"does not support '{field}': leave it out", field)
        _in_range("temperature", sampling.temperature, sampling.temperature >= 0, "0 or more")
        _in_range("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1")
        _in_range("top_k", sampling.top_k, sampling.top_k >= 0, "0 (off) or more")
        _in_range("min_p", sampling.min_p, 0 <= sampling.min_p < 1, "at least 0 and below 1")
        for field in ("presence_penalty", "frequency_penalty"):
            value = getattr(sampling, field)
            _in_range(field, value, -2 <= value <= 2, "from -2 to 2")
        _in_range("repetition_penalty", sampling.repetition_penalty, sampling.repetition_penalty > 0, "above 0")
        if sampling.logit_bias:
            self._check_ids("logit_bias", min(sampling.logit_bias), max(sampling.logit_bias))
        for sequence in sampling.bad_token_sequences:
            if not sequence:
                raise RequestRejected("bad_token_sequences holds an empty sequence.", param="bad_token_sequences")
            self._check_ids("bad_token_sequences", min(sequence), max(sequence))

    def _check_extras(self, request: EngineRequest) -> None:
        can, info = self._capabilities, self._info
        for field in ("logprobs", "prompt_logprobs"):
            count = getattr(request, field)
            if count is None:
                continue
            if not getattr(can, field):
                raise self._refusal(f"gives no {field}: leave it out", field)
            _in_range(field, count, 0 <= count <= MOST_LOGPROBS, f"from 0 to {MOST_LOGPROBS}")
        if request.constraint is not None and request.constraint.kind not in can.constraints:
            kinds = ", ".join(sorted(can.constraints)) or "none"
            raise self._refusal(
                f"has no structured output of kind '{request.constraint.kind}'; it has {kinds}", "response_format"
            )
        if request.lora is not None and not can.lora:
            raise self._refusal("serves no LoRA adapters: ask for the base model", "model")
        if request.priority and not can.priority:
            raise self._refusal("has no priorities: leave 'priority' out", "priority")
        rank = request.data_parallel_rank
        if rank is not None and not 0 <= rank < info.data_parallel_size:
            raise RequestRejected(
                f"Data-parallel rank {rank} does not exist; this worker has ranks 0 to {info.data_parallel_size - 1}."
            )

    def _check_continuation(self, request: EngineRequest) -> None:
        prior, total = request.prior_tokens, len(request.token_ids)
        if not 0 < prior < total:
            raise RequestRejected(
                f"prior_tokens is {prior} and there are {total} tokens in all; "
                "it counts the generated ones, and at least one prompt token comes before them."
            )
        sampling, can = request.sampling, self._capabilities.continues
        needed = (
            (Continuation.SEED, sampling.seed is not None and sampling.temperature > 0),
            (Continuation.PENALTIES, bool(sampling.presence_penalty or sampling.frequency_penalty)),
            (Continuation.CONSTRAINT, request.constraint is not None),
        )
        for what, used in needed:
            if used and what not in can:
                raise self._refusal(f"cannot resume a sequence that uses a {what.rstrip('s')}: start it again", None)

    def _check_ids(self, field: str, low: int, high: int) -> None:
        if low < 0 or high >= self._info.vocab_size:
            raise RequestRejected(
                f"Token id {low if low < 0 else high} in {field} is outside the vocabulary, "
                f"0 to {self._info.vocab_size - 1}.",
                param=field,
            )

    def _refusal(self, what: str, param: str | None) -> RequestRejected:
        return RequestRejected(f"Engine '{self._name}' {what}.", param=param, code="unsupported_by_engine")


def _in_range(field: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise RequestRejected(f"{field} is {value}; it must be {expected}.", param=field)
