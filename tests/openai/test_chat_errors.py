"""Chat completions that go wrong: each in a sentence that names the field, and with nothing left running."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from answers import WEATHER, error
from scripted import ScriptedEngine, make_card, make_tokenizer

from core.messages import (
    Capabilities,
    EngineDead,
    EngineDraining,
    Overloaded,
    RequestRejected,
)
from core.openai.card import ModelCard
from core.openai.pipeline import Pipeline

URL = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]


def body(**fields: object) -> dict[str, object]:
    return {"model": "tiny", "messages": USER, **fields}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 2.5}, "temperature", "'temperature' must be at most 2.0, found 2.5."),
    ({"temperature": "hot"}, "temperature", "'temperature' must be a number, found \"hot\"."),
    ({"top_p": 0}, "top_p", "must be more than 0.0"),
    ({"n": 0}, "n", "must be at least 1"),
    ({"n": 1.5}, "n", "'n' must be an integer, found 1.5."),
    ({"presence_penalty": -3}, "presence_penalty", "at least -2.0"),
    ({"top_logprobs": 5}, "top_logprobs", "needs 'logprobs'"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids in decimal"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "ids are 0 to"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "A value of 'logit_bias' must be at most 100"),
    ({"stop": ["a"] * 33}, "stop", "at most 32"),
    ({"stop": ""}, "stop", "at least 1"),
    ({"stop_token_ids": [99999]}, "stop_token_ids", "ids are 0 to"),
    ({"seed": 2**64}, "seed", "'seed' "),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "must be one of 'assistant', 'developer'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "is missing"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages[0].content[0].type",
        "this model reads text only",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "is missing"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only for streamed answers"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "one of 'json_object', 'json_schema', 'text'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "keep one of them"),
    ({"guided_choice": []}, "guided_choice", "is empty"),
    ({"min_tokens": 5, "max_tokens": 2}, "min_tokens", "'min_tokens' is 5"),
    ({"functions": [{"name": "f"}]}, "functions", "retired"),
    ({"tool_choice": "required"}, "tools", "list the tools"),
    ({"tools": [{"type": "function", "function": {"name": "b@d"}}]}, "tools[0].function.name", "must match"),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "tool_choice.function.name",
        "'tools' has get_weather",
    ),
    ({"tools": [WEATHER], "tool_choice": "required", "guided_regex": "a"}, "tool_choice", "keep one of them"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "may not set messages"),
    ({"continue_final_message": True}, "continue_final_message", "is the user's"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
]


@pytest.mark.parametrize(("fields", "param", "sentence"), REFUSED, ids=lambda v: str(v)[:30])
async def test_refused_with_the_field_and_a_sentence(
    client: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], param: str, sentence: str
):
    assert sentence in error(await client.post(URL, json=body(**fields)), 400, param)
    assert engine.requests == []


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "The body is empty"),
        (b"{", "not valid JSON"),
        (b"[]", "The body must be an object, found a list."),
        (b"null", "The body must be an object, found null."),
        (b'{"model": "tiny", "messages": NaN}', "not valid JSON"),
        (b'{"model": "tiny", "temperature": 1e999}', "'temperature' is not acceptable"),
        (b'{"model": "\xff"}', "not valid UTF-8"),
        (b'{"model": "\\ud800"}', "not valid JSON"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "'model' is missing"),
        (b'{"model": "tiny"}', "'messages' is missing"),
    ],
)
async def test_broken_bodies(client: httpx.AsyncClient, raw: bytes, sentence: str):
    response = await client.post(URL, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]


async def test_the_last_of_duplicate_keys_counts(client: httpx.AsyncClient, engine: ScriptedEngine):
    raw = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"seed":1,"seed":2}'
    assert (await client.post(URL, content=raw, headers={"content-type": "application/json"})).status_code == 200
    assert engine.requests[0].sampling.seed == 2


async def test_too_long_prompts_are_refused_with_both_numbers(client: httpx.AsyncClient):
    response = await client.post(URL, json=body(messages=[{"role": "user", "content": "Hello " * 600}]))
    message = error(response, 400, "messages")
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "512 tokens" in message
    assert f"has {len('Hello ' * 600) // 6}"[:5] in message


async def test_unknown_models_are_told_what_is_served(client: httpx.AsyncClient):
    response = await client.post(URL, json=body(model="gpt-9"))
    assert "served are tiny, tiny-alias, adapter" in error(response, 404, "model")
    assert response.json()["error"]["code"] == "model_not_found"


async def test_what_the_engine_cannot_do_is_refused(
    folder: Any, make_pipeline: Callable[..., Pipeline], make_client: Callable[..., httpx.AsyncClient]
):
    card: ModelCard = make_card(folder, capabilities=Capabilities())
    client = make_client(make_pipeline(card))
    assert "not supported" in error(await client.post(URL, json=body(logprobs=True)), 400, "logprobs")
    fields = {"response_format": {"type": "json_object"}}
    assert "no structured output" in error(await client.post(URL, json=body(**fields)), 400, "response_format")
    fields = {"tools": [WEATHER], "tool_choice": "required"}
    assert "needs structured output" in error(await client.post(URL, json=body(**fields)), 400, "tool_choice")


async def test_models_without_tools_or_template_say_so(
    tmp_path_factory: pytest.TempPathFactory,
    make_pipeline: Callable[..., Pipeline],
    make_client: Callable[..., httpx.AsyncClient],
):
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = make_tokenizer(tmp_path_factory.mktemp("plain"), template=plain)
    client = make_client(make_pipeline(make_card(folder)))
    assert "tool-call-parser" in error(await client.post(URL, json=body(tools=[WEATHER])), 400, "tools")
    folder = make_tokenizer(tmp_path_factory.mktemp("none"), template=None)
    client = make_client(make_pipeline(make_card(folder)))
    assert "has no chat template" in error(await client.post(URL, json=body()), 400, "messages")


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (RequestRejected("The grammar is wrong.", param="guided_grammar"), 400),
        (Overloaded("No room.", retry_after=7), 429),
        (EngineDraining("Leaving."), 503),
        (EngineDead("Broken."), 503),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_errors_before_the_first_token_have_their_status(
    client: httpx.AsyncClient, engine: ScriptedEngine, raised: Exception, status: int, stream: bool
):
    engine.error = raised
    response = await client.post(URL, json=body(stream=stream))
    assert response.status_code == status
    assert response.json()["error"]["message"] == str(raised)
    if status == 429:
        assert response.headers["retry-after"] == "7"


async def test_later_errors_are_one_event_that_ends_the_stream(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.error, engine.error_after = EngineDead("Broken."), 2
    response = await client.post(URL, json=body(stream=True))
    assert response.status_code == 200
    *content, last, rest = response.text.split("\n\n")
    assert (len(content), rest) == (2, "")
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "Broken."
    assert "[DONE]" not in response.text


async def test_a_defect_is_logged_and_not_shown(
    client: httpx.AsyncClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
):
    engine.error = ZeroDivisionError("secret detail")
    response = await client.post(URL, json=body(), headers={"x-request-id": "mine-1"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret detail" in caplog.text
    assert "mine-1" in caplog.text
    assert response.headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize("stream", [True, False])
async def test_one_failing_choice_ends_the_others(client: httpx.AsyncClient, engine: ScriptedEngine, stream: bool):
    engine.text = lambda r: "fox" if r.request_id.endswith("-1") else "The quick brown fox jumps over the lazy dog"
    engine.error, engine.error_after = EngineDead("Broken."), 3
    response = await client.post(URL, json=body(n=3, stream=stream, ignore_eos=True))
    assert "Broken." in response.text
    assert (engine.running, len(engine.requests)) == (0, 3)


async def test_request_ids_come_back_and_stay_apart(client: httpx.AsyncClient, engine: ScriptedEngine):
    for given, shown in (("job-1", "job-1"), ("job-1", "job-1"), ("bad id\u00e9", None), (None, None)):
        headers = {} if given is None else {"x-request-id": given.encode("latin-1")}
        response = await client.post(URL, json=body(), headers=headers)
        assert shown is None or response.headers["x-request-id"] == shown
        assert response.headers["x-request-id"]
    assert len({r.request_id for r in engine.requests}) == 4
    assert engine.requests[0].request_id.startswith("job-1")
