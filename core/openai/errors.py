"""OpenAI's error object, and which HTTP status an error is."""

from __future__ import annotations

import msgspec

from core.messages import (
    DeadlineExceeded,
    EngineDead,
    EngineDraining,
    EngineError,
    Overloaded,
    RequestRejected,
    Unavailable,
)

STATUS_OF_CODE = {
    "invalid_api_key": 401,
    "not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "request_too_large": 413,
    "unsupported_media_type": 415,
    "headers_too_large": 431,
}
"""Codes of `RequestRejected` whose status is not 400."""


class ErrorObject(msgspec.Struct):
    """The inner object of OpenAI's error body."""

    message: str
    """What was found, what was expected, what to do."""
    type: str
    param: str | None
    """Field of the request at fault."""
    code: str | None


class ErrorBody(msgspec.Struct):
    """Every answer with a status of 400 or more has this body."""

    error: ErrorObject


def describe(error: BaseException) -> tuple[int, ErrorObject]:
    """Status and error object of anything a backend may raise. A defect shows no internals to the client."""
    match error:
        case RequestRejected():
            status = STATUS_OF_CODE.get(error.code or "", 400)
            kind = "authentication_error" if status == 401 else "invalid_request_error"
            return status, ErrorObject(str(error), kind, error.param, error.code)
        case DeadlineExceeded():
            return 504, ErrorObject(str(error), "timeout_error", None, "deadline_exceeded")
        case Unavailable() | EngineDraining() | EngineDead():
            return 503, ErrorObject(str(error), "service_unavailable_error", None, "service_unavailable")
        case Overloaded():
            return 429, ErrorObject(str(error), "overloaded_error", None, "overloaded")
        case EngineError():
            return 500, ErrorObject(str(error), "internal_error", None, "engine_error")
    message = "The server failed on this request; its log has the reason under the id in X-Request-Id."
    return 500, ErrorObject(message, "internal_error", None, "internal_error")


def is_defect(error: BaseException) -> bool:
    """Whether the error is nobody's fault but ours, so that its traceback belongs in the log."""
    return describe(error)[0] == 500 and not isinstance(error, EngineError)


def error_json(error: ErrorObject) -> bytes:
    """The body of an error answer."""
    return msgspec.json.encode(ErrorBody(error))


def error_event(error: ErrorObject) -> bytes:
    """The one event that ends a stream which cannot go on."""
    return b"data: " + error_json(error) + b"\n\n"


def retry_after(error: BaseException) -> float | None:
    """Seconds for the Retry-After header, where trying again makes sense."""
    if isinstance(error, Overloaded):
        return error.retry_after
    return 1.0 if isinstance(error, EngineDraining | EngineDead) else None
