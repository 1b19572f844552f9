"""The OpenAI requests as typed structs: what is accepted, in which range, and what it means here.

Bodies are decoded straight into these. Fields that are not listed are accepted and ignored, as OpenAI does; a listed
field of the wrong type or out of range is refused with its name. `null` is the same as leaving a field out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Probability = Annotated[float, Meta(gt=0, le=1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Choices = Annotated[int, Meta(ge=1, le=128)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Meta(max_length=32)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
FunctionName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class _Lenient(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Unknown fields are ignored; absent and null fields are None."""


class ContentPart(_Lenient, kw_only=True):
    """One part of a message's content. Only text can be read; other types are refused with a sentence."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(_Lenient, kw_only=True):
    """The function of a tool call that the assistant made earlier."""

    name: str
    arguments: str = "{}"
    """JSON text."""


class MessageToolCall(_Lenient, kw_only=True):
    """A tool call that the assistant made earlier."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class ChatMessage(_Lenient, kw_only=True):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionDefinition(_Lenient, kw_only=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Lenient, kw_only=True):
    """A tool that the model may call."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class ChosenFunction(_Lenient, kw_only=True):
    """Names a function of `tools`."""

    name: str


class NamedToolChoice(_Lenient, kw_only=True):
    """Makes the model call this function."""

    function: ChosenFunction
    type: Literal["function"] = "function"


class JsonSchemaFormat(_Lenient, kw_only=True):
    """The schema that the answer must satisfy."""

    name: str = "answer"
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(_Lenient, kw_only=True):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(_Lenient, kw_only=True):
    """Extension: the language of the answer; exactly one field."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None


class StreamOptions(_Lenient, kw_only=True):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Extension: usage so far in every chunk."""


class GenerationRequest(_Lenient, kw_only=True):
    """What chat and plain completions share."""

    model: str
    n: Choices | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    """Token id, in decimal, to a number added to its logit."""
    seed: Seed | None = None
    stop: StopString | StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    """Used for session affinity."""
    prompt_cache_key: str | None = None
    """Used for session affinity, before `user`."""
    # Extensions, in the names that other servers use.
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    stop_token_ids: list[TokenId] | None = None
    bad_words: list[StopString] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    priority: Priority | None = None
    """Larger is served first."""
    cache_salt: str | None = None
    """Prompts share cached KV only within one salt."""


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    """Retired by OpenAI; refused in favour of `tools`."""
    function_call: Any = None
    """Retired by OpenAI; refused in favour of `tool_choice`."""
    add_generation_prompt: bool | None = None
    """Extension: end the prompt with the head of an assistant message (the default)."""
    continue_final_message: bool | None = None
    """Extension: the last message, the assistant's, is continued instead of answered."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Extension: further variables for the model's chat template."""
    include_reasoning: bool | None = None
    """Extension: false leaves the model's reasoning out of the answer."""


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str | TokenId | list[TokenId]]
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    max_tokens: Count | None = None
    echo: bool | None = None
    suffix: str | None = None
    """Refused unless empty: no model here fills in the middle."""
    best_of: Choices | None = None
    """Refused unless equal to `n`."""
    logprobs: TopLogprobs | None = None
    add_special_tokens: bool | None = None
    """Extension: whether the tokenizer adds its begin-of-text token (the default)."""


class TokenizeRequest(_Lenient, kw_only=True):
    """Body of `POST /v1/tokenize`: a `prompt`, or `messages` as in a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Lenient, kw_only=True):
    """Body of `POST /v1/detokenize`."""

    tokens: list[TokenId]
    model: str | None = None
    skip_special_tokens: bool | None = None
