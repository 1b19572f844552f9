"""What tests read out of answers."""

from __future__ import annotations

import json
from typing import Any

import httpx

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, whose framing is checked."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part[6:]) for part in parts]


def error(response: httpx.Response, status: int, param: str | None = None) -> str:
    """The message of an error in OpenAI's shape."""
    assert response.status_code == status, response.text
    described = response.json()["error"]
    assert set(described) == {"message", "type", "param", "code"}
    assert described["param"] == param
    assert described["message"].endswith(".")
    return str(described["message"])
