"""From OpenAI's parameters to the engine's: sampling, stop conditions, structured output."""

from __future__ import annotations

import msgspec

from core.messages import Constraint, ConstraintKind, RequestRejected, SamplingParams, StopConditions
from core.openai.card import ModelCard
from core.openai.protocol import GenerationRequest
from core.openai.tokenizer import TextTokenizer

_PLAIN = SamplingParams()


def sampling_params(request: GenerationRequest, card: ModelCard, tokenizer: TextTokenizer) -> SamplingParams:
    """How to choose tokens. Raises `RequestRejected` for token ids outside the vocabulary."""
    top_k = request.top_k
    return SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=0 if top_k is None or top_k < 0 else top_k,
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        seed=request.seed,
        logit_bias=_logit_bias(request.logit_bias, card) if request.logit_bias else _PLAIN.logit_bias,
        bad_token_sequences=_bad_words(request.bad_words, tokenizer) if request.bad_words else (),
    )


def stop_conditions(
    request: GenerationRequest, card: ModelCard, limit: int | None, prompt_tokens: int, *, param: str
) -> StopConditions:
    """When to end. `limit`: the output tokens that were asked for, None for all there is room for; `param`: where
    the prompt came from.

    Raises `RequestRejected` when the prompt leaves no room for a single token.
    """
    room = card.max_model_len - prompt_tokens
    if room < 1:
        raise _too_long(card, prompt_tokens, param)
    max_tokens = room if limit is None else min(limit, room)
    min_tokens = request.min_tokens or 0
    if limit is not None and min_tokens > limit:
        raise RequestRejected(
            f"'min_tokens' is {min_tokens} and the most tokens to generate are {limit}; lower one or raise the other.",
            param="min_tokens",
        )
    ids = tuple(request.stop_token_ids) if request.stop_token_ids else ()
    if ids and max(ids) >= card.vocab_size:
        raise _outside("stop_token_ids", max(ids), card)
    return StopConditions(
        max_tokens=max(1, max_tokens),
        min_tokens=min(min_tokens, max_tokens),
        stop_token_ids=ids,
        ignore_eos=bool(request.ignore_eos),
    )


def _too_long(card: ModelCard, prompt_tokens: int, param: str) -> RequestRejected:
    return RequestRejected(
        f"The prompt has {prompt_tokens} tokens and this model's longest sequence, prompt and output together, is "
        f"{card.max_model_len} tokens; shorten the prompt to at most {card.max_model_len - 1} tokens.",
        param=param,
        code="context_length_exceeded",
    )


def stop_strings(request: GenerationRequest) -> tuple[str, ...]:
    """Where to cut the text."""
    stop = request.stop
    if not stop:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(dict.fromkeys(stop))


def constraint(request: GenerationRequest, card: ModelCard) -> Constraint | None:
    """The language of the answer. Raises `RequestRejected` for two at once, or one that the engine does not know."""
    found: list[tuple[str, Constraint]] = []

    def add(param: str, kind: ConstraintKind, value: object) -> None:
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        found.append((param, Constraint(kind, text)))

    form = request.response_format
    if form is not None and form.type == "json_object":
        add("response_format", ConstraintKind.JSON_OBJECT, "")
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema is None:
            raise RequestRejected(
                "'response_format.json_schema.schema' is missing; give the JSON schema of the answer.",
                param="response_format.json_schema",
            )
        add("response_format", ConstraintKind.JSON_SCHEMA, form.json_schema.schema)
    outputs = request.structured_outputs
    languages: list[tuple[str, ConstraintKind, object]] = [
        ("guided_json", ConstraintKind.JSON_SCHEMA, request.guided_json),
        ("guided_regex", ConstraintKind.REGEX, request.guided_regex),
        ("guided_grammar", ConstraintKind.GRAMMAR, request.guided_grammar),
        ("guided_choice", ConstraintKind.CHOICE, request.guided_choice),
    ]
    if outputs is not None:
        languages += [
            ("structured_outputs.json", ConstraintKind.JSON_SCHEMA, outputs.json),
            ("structured_outputs.json_object", ConstraintKind.JSON_OBJECT, "" if outputs.json_object else None),
            ("structured_outputs.regex", ConstraintKind.REGEX, outputs.regex),
            ("structured_outputs.grammar", ConstraintKind.GRAMMAR, outputs.grammar),
            ("structured_outputs.choice", ConstraintKind.CHOICE, outputs.choice),
        ]
    for param, kind, value in languages:
        if value is not None:
            if value == []:
                raise RequestRejected(f"'{param}' is empty; list at least one choice.", param=param)
            add(param, kind, value)
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(f"'{param}'" for param, _ in found)
        raise RequestRejected(f"{names} each fix the form of the answer; keep one of them.", param=found[1][0])
    param, wanted = found[0]
    require(wanted.kind, card, param)
    return wanted


def require(kind: ConstraintKind, card: ModelCard, param: str) -> None:
    """Raises `RequestRejected` when the engine has no such structured output."""
    known = card.capabilities.constraints
    if kind not in known:
        there_is = f"it has {', '.join(sorted(known))}" if known else "it has no structured output"
        raise RequestRejected(
            f"'{param}' needs structured output of kind {kind}, which the engine of this model lacks: {there_is}. "
            "Leave it out or ask for a model on another engine.",
            param=param,
            code="unsupported_constraint",
        )


def _logit_bias(given: dict[str, float], card: ModelCard) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise RequestRejected(
                f"'logit_bias' has the key {key[:40]!r}; keys are token ids in decimal.", param="logit_bias"
            )
        if int(key) >= card.vocab_size:
            raise _outside("logit_bias", int(key), card)
        bias[int(key)] = value
    return bias


def _bad_words(words: list[str], tokenizer: TextTokenizer) -> tuple[tuple[int, ...], ...]:
    """A word may begin a text or follow a space, which are different tokens."""
    spelled = [tokenizer.encode(form, add_special_tokens=False) for w in words for form in (w, " " + w.lstrip(" "))]
    return tuple(dict.fromkeys(tuple(ids) for ids in spelled if ids))


def _outside(param: str, token_id: int, card: ModelCard) -> RequestRejected:
    return RequestRejected(
        f"'{param}' names token {token_id}; this model's ids are 0 to {card.vocab_size - 1}.", param=param
    )
