"""The answers as typed structs: what non-streaming calls return and what the OpenAPI document describes."""

from __future__ import annotations

from typing import Literal

import msgspec


class PromptTokensDetails(msgspec.Struct):
    """Of the prompt's tokens."""

    cached_tokens: int
    """Tokens whose KV was at hand and not computed."""


class Usage(msgspec.Struct):
    """Tokens of one request, over all its choices; a prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct):
    """One generated token."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a chat choice."""

    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a completion choice, one entry a token in every list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Function(msgspec.Struct):
    """What the model calls, and with what: `arguments` is JSON text as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """One call of a function."""

    id: str
    function: Function
    type: Literal["function"] = "function"


class AssistantMessage(msgspec.Struct):
    """The model's answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    """One answer of a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(msgspec.Struct):
    """Answer to `POST /v1/chat/completions` without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(msgspec.Struct):
    """One completed text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(msgspec.Struct):
    """Answer to `POST /v1/completions` without `stream`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(msgspec.Struct):
    """One model that requests may name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """The model itself, or the base model of a LoRA adapter."""
    max_model_len: int
    engine: str


class ModelList(msgspec.Struct):
    """Answer to `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Tokens(msgspec.Struct):
    """Answer to `POST /v1/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(msgspec.Struct):
    """Answer to `POST /v1/detokenize`."""

    prompt: str


class Health(msgspec.Struct):
    """Answer to `GET /health`."""

    status: Literal["ok", "unavailable"]
    reason: str | None = None


class Version(msgspec.Struct):
    """Answer to `GET /version`."""

    version: str
