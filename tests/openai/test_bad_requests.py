"""Ten thousand bad requests: each gets an answer in OpenAI's shape, none a status of 500 or more."""

from __future__ import annotations

import asyncio
import json
import random
import string
from collections.abc import Callable
from typing import Any

import pytest
from scripted import ScriptedEngine

from core.openai.app import create_app
from core.openai.pipeline import Pipeline
from core.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from core.openai.settings import HttpSettings

COUNT = 10_000
PATHS: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}),
    "/v1/completions": (CompletionRequest, {"model": "tiny", "prompt": "Hi"}),
    "/v1/tokenize": (TokenizeRequest, {"prompt": "Hi"}),
    "/v1/detokenize": (DetokenizeRequest, {"tokens": [1, 2]}),
}
STRINGS = [
    "", " ", "tiny", "\x00", "\ud800", "é東😀", "x" * 5000, "{{ 7*7 }}", "<|im_end|>", "%s%n", "../../etc/passwd",
    '{"a":', "required", "function", "assistant", "\u202e", "]]>", "null", "-1", "1e400", "user", "json_schema",
]  # fmt: skip
NUMBERS = [0, -1, 1, 2, 3.7, 21, 2**31, 2**63, -(2**63) - 1, 10**40, 1e308, -1e308, 1e-320, 0.1, 1000, 128, 129]


def anything(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(8 if depth < 4 else 6)
    if kind == 0:
        return None
    if kind == 1:
        return chance.random() < 0.5
    if kind in (2, 3):
        return chance.choice(NUMBERS)
    if kind in (4, 5):
        return chance.choice(STRINGS)
    if kind == 6:
        return [anything(chance, depth + 1) for _ in range(chance.randrange(4))]
    keys = ["type", "role", "content", "name", "function", "text", "a", "schema", "json_schema", "arguments", "5", ""]
    return {chance.choice(keys): anything(chance, depth + 1) for _ in range(chance.randrange(4))}


def bad_body(chance: random.Random, type_: Any, base: dict[str, Any]) -> bytes:
    body: dict[str, Any] = json.loads(json.dumps(base))
    known = type_.__struct_fields__
    for _ in range(chance.choice((1, 1, 2, 3, 6))):
        body[chance.choice(known)] = anything(chance)
    if chance.random() < 0.1:
        body.pop(chance.choice(list(body)))
    if chance.random() < 0.2 and "messages" in body:
        message = {
            f: anything(chance) for f in chance.sample(["role", "content", "tool_calls", "name", "tool_call_id"], 3)
        }
        body["messages"] = [{"role": "assistant", "content": "x", **message}]
    raw = json.dumps(body, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    damage = chance.random()
    if damage < 0.04:
        raw = raw[: chance.randrange(len(raw))]
    elif damage < 0.08:
        place = chance.randrange(len(raw))
        raw = raw[:place] + bytes([chance.randrange(256)]) + raw[place + 1 :]
    elif damage < 0.10:
        raw = chance.randbytes(chance.randrange(60))
    elif damage < 0.12:
        key = "".join(chance.choices(string.ascii_letters, k=3))
        raw = raw[:-1] + b', "' + key.encode() + b'": ' + b"[{" * chance.choice((3, 3000)) + b"}"
    return raw


async def call(app: Callable[..., Any], path: str, raw: bytes, kind: bytes) -> tuple[int, bytes]:
    """As HTTP would, without a client's cost."""
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "root_path": "", "headers": [(b"content-type", kind)], "scheme": "http",
    }  # fmt: skip
    sent: list[dict[str, Any]] = []
    unread = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not unread:
            await asyncio.Event().wait()  # the client stays
        return unread.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(m["body"] for m in sent[1:])


@pytest.mark.timeout(240)
async def test_no_bad_request_is_our_fault(pipeline: Pipeline, engine: ScriptedEngine):
    app = create_app(pipeline, HttpSettings(access_log=False))
    chance = random.Random(20_240_229)
    statuses: dict[int, int] = {}
    engine.text = "Hi"
    for number in range(COUNT):
        path, (type_, base) = chance.choice(list(PATHS.items()))
        raw = bad_body(chance, type_, base)
        kind = chance.choice((b"application/json",) * 9 + (b"text/plain\xff",))
        status, answer = await call(app, path, raw, kind)
        statuses[status] = statuses.get(status, 0) + 1
        assert status < 500, f"request {number}: POST {path} {raw[:2000]!r} -> {status} {answer!r}"
        if status >= 400:
            error = json.loads(answer)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"].endswith("."), error
    assert statuses[400] > COUNT / 2, statuses
    assert engine.running == 0
    await app.state.watch.close()
