"""Errors that cross doors. Each says what was found, what was expected and what to do."""

from __future__ import annotations


class DynamoError(Exception):
    """Base of every error this framework raises on purpose; its text is fit for a user."""


class ConfigError(DynamoError):
    """The deployment as configured cannot be started. Ends the command with one sentence and exit code 2."""


class EngineError(DynamoError):
    """An engine could not serve one request. `retryable`: another worker may succeed."""

    retryable = False


class RequestRejected(EngineError):
    """The request itself is at fault (HTTP 400). `param` names the field of the OpenAI request, if one is at fault."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Overloaded(EngineError):
    """No room now (HTTP 429 or 503). `retry_after`: seconds after which trying again makes sense."""

    retryable = True

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(Overloaded):
    """Nothing serves the model now (HTTP 503): no worker is alive, or the server is leaving."""


class DeadlineExceeded(Overloaded):
    """The request's time was used up before its answer was complete (HTTP 504)."""


class EngineDead(EngineError):
    """The engine is broken for good: every later call fails. The worker leaves and is replaced."""

    retryable = True


class EngineDraining(EngineError):
    """The worker takes no new requests because it is about to leave."""

    retryable = True
