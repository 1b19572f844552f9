"""The OpenAPI document, made from the same structs that requests are decoded into."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from core import __version__
from core.field_docs import field_docs
from core.openai.errors import ErrorBody
from core.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from core.openai.responses import ChatCompletion, Completion, Health, Model, ModelList, Text, Tokens, Version

_STRUCTS: tuple[type[msgspec.Struct], ...] = (
    ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest,
    ChatCompletion, Completion, Tokens, Text, Model, ModelList, Health, Version, ErrorBody,
)  # fmt: skip

_STRING = {"type": "string"}

_ERRORS = {
    "400": "The request is at fault; `param` names the field.",
    "401": "No valid API key.",
    "404": "The model is not served here.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "No room now; try again after Retry-After seconds.",
    "500": "A defect of the server; its log has the reason under X-Request-Id.",
    "503": "Nothing serves the model now; try again after Retry-After seconds.",
    "504": "The answer was not complete in time.",
}


def document() -> dict[str, Any]:
    """The whole document, as JSON-able data."""
    _, components = msgspec.json.schema_components(_STRUCTS, ref_template="#/components/schemas/{name}")
    for struct in _STRUCTS:
        for field, meaning in field_docs(struct).items():
            if field in components[struct.__name__]["properties"]:
                components[struct.__name__]["properties"][field]["description"] = meaning
    components["CompletionRequest"]["properties"]["prompt"] = _prompt(components["CompletionRequest"])
    return {
        "openapi": "3.1.0",
        "info": {"title": "Dynamo", "version": __version__, "description": "OpenAI-compatible serving."},
        "paths": {
            "/v1/chat/completions": {"post": _generation("Answer a conversation", "chat", ChatRequest, ChatCompletion)},
            "/v1/completions": {"post": _generation("Continue a text", "completions", CompletionRequest, Completion)},
            "/v1/models": {"get": _read("List what is served", "models", ModelList, "401")},
            "/v1/models/{model}": {"get": _model()},
            "/v1/tokenize": {"post": _call("Token ids of a text or conversation", "tokenize", TokenizeRequest, Tokens)},
            "/v1/detokenize": {"post": _call("Text of token ids", "detokenize", DetokenizeRequest, Text)},
            "/tokenize": {"post": _call("As /v1/tokenize", "tokenize_short", TokenizeRequest, Tokens)},
            "/detokenize": {"post": _call("As /v1/detokenize", "detokenize_short", DetokenizeRequest, Text)},
            "/health": {"get": _health()},
            "/live": {"get": _read("Whether the process answers", "live", Health)},
            "/version": {"get": _read("The version", "version", Version)},
            "/metrics": {"get": {
                "summary": "Metrics in Prometheus' text format",
                "operationId": "metrics",
                "responses": {"200": {"description": "Text", "content": {"text/plain": {"schema": _STRING}}}},
            }},
        },
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }  # fmt: skip


@cache
def encoded() -> bytes:
    """The document as JSON."""
    return msgspec.json.encode(document())


def _prompt(request: dict[str, Any]) -> dict[str, Any]:
    """msgspec has one list type for all kinds of prompts; which may not be mixed."""
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}
    texts = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
    lists = {"type": "array", "items": ids, "minItems": 1}
    old = request["properties"]["prompt"]
    return {
        **{k: v for k, v in old.items() if k != "anyOf"},
        "anyOf": [{"type": "string", "minLength": 1}, texts, ids, lists],
    }


def _ref(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{struct.__name__}"}}


def _json(struct: type[msgspec.Struct], description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": _ref(struct)}}


def _errors(*codes: str) -> dict[str, Any]:
    return {code: _json(ErrorBody, _ERRORS[code]) for code in codes}


def _read(summary: str, name: str, answer: type[msgspec.Struct], *errors: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "operationId": name,
        "responses": {"200": _json(answer, summary), **_errors(*errors)},
    }


def _call(
    summary: str, name: str, request: type[msgspec.Struct], answer: type[msgspec.Struct], *errors: str
) -> dict[str, Any]:
    codes = ("400", "401", "404", "408", "413", "415", "429", *errors)
    return {
        **_read(summary, name, answer, *codes),
        "requestBody": {"required": True, "content": {"application/json": _ref(request)}},
    }


def _generation(summary: str, name: str, request: type[msgspec.Struct], answer: type[msgspec.Struct]) -> dict[str, Any]:
    operation = _call(summary, name, request, answer, "500", "503", "504")
    operation["responses"]["200"]["content"]["text/event-stream"] = {
        "schema": {
            "type": "string",
            "description": "With `stream`: server-sent events, chunks as OpenAI's, then [DONE].",
        }
    }
    return operation


def _model() -> dict[str, Any]:
    operation = _read("One served model", "model", Model, "401", "404")
    operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


def _health() -> dict[str, Any]:
    operation = _read("Whether requests can be answered", "health", Health)
    operation["responses"]["503"] = _json(Health, "They cannot, for the reason given.")
    return operation
