"""What an operator can set of the HTTP surface."""

from __future__ import annotations

import msgspec


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP server. Times are seconds, sizes bytes."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_keys: tuple[str, ...] = ()
    """Accepted bearer tokens; empty lets everybody in. Health, metrics and documentation stay open."""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call this server; empty turns CORS off."""
    max_body_size: int = 32 * 2**20
    max_header_size: int = 64 * 2**10
    header_timeout: float = 15.0
    """From the opening of a connection, or the first byte of a request, to the end of its headers and body."""
    keep_alive_timeout: float = 75.0
    """An idle connection is closed after this."""
    request_timeout: float = 600.0
    """Every request ends within this, in an answer or one error."""
    slow_client_timeout: float = 20.0
    """A client that reads nothing for this long while data waits is dropped and its request aborted."""
    max_requests: int = 4096
    """More requests at once are refused with 429."""
    access_log: bool = True
    """One line a request on the logger `dynamo.access`."""


class PipelineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The way from messages to tokens and back."""

    chat_template: str | None = None
    """File that replaces the model's chat template."""
    tool_call_parser: str | None = None
    """Format of the model's tool calls ("hermes", "llama3_json" ...); None detects it from the chat template."""
    reasoning_parser: str | None = None
    """"think" splits `<think>` sections off, "none" does not; None detects it from the chat template."""
    default_max_tokens: int | None = None
    """For chat requests that set no limit; None allows everything up to the model's length."""
    fast_tokenizer: bool = True
    """Encode with `fastokens` where it is installed and agrees with `tokenizers`."""
    tokenizer_threads: int = 2
    """Threads for prompts too long to be encoded on the event loop."""
