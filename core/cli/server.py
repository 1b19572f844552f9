"""A running deployment, as commands that ask it something see it."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any, TypeVar

import click
import msgspec

from core.messages import DynamoError
from core.openai.errors import ErrorBody

T = TypeVar("T")

TIMEOUT = 30.0
"""Seconds that a deployment has to answer."""


class Server:
    """Its HTTP endpoint."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        if not self._url.startswith(("http://", "https://")):
            raise click.UsageError(f"--url is '{url}'; write it as http://HOST:PORT.")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def call(self, path: str, body: dict[str, Any] | None) -> bytes:
        """The answer's body. Raises `DynamoError` with the server's own sentence, or why there is no answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise DynamoError(self._said(error)) from error
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise DynamoError(
                f"{self._url} does not answer: {why}. Is the deployment running? --url says where it is."
            ) from error

    def decode(self, raw: bytes, kind: type[T]) -> T:
        """The body as a struct. Raises `DynamoError` when it is something else."""
        try:
            return msgspec.json.decode(raw, type=kind)
        except msgspec.MsgspecError as error:
            raise DynamoError(
                f"{self._url} answers, but not as this version does ({error}); is it a Dynamo deployment?"
            ) from error

    def _said(self, error: urllib.error.HTTPError) -> str:
        try:
            message = msgspec.json.decode(error.read(), type=ErrorBody).error.message
        except (msgspec.MsgspecError, OSError):
            message = f"it answers with status {error.code}, and not as this version does."
        return f"{self._url}: {message}"
