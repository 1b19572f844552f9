"""The `openai` Python client against a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from answers import CALL, WEATHER
from scripted import ScriptedEngine

from core.openai.app import create_app
from core.openai.pipeline import Pipeline
from core.openai.server import HttpServer
from core.openai.settings import HttpSettings

USER: list[Any] = [{"role": "user", "content": "Hello"}]
TOOLS: Any = [WEATHER]


@pytest.fixture
async def openai_client(pipeline: Pipeline) -> AsyncIterator[openai.AsyncOpenAI]:
    settings = HttpSettings(port=0, api_keys=("key",))
    async with HttpServer(create_app(pipeline, settings), settings) as server:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0)
        async with client:
            yield client


async def test_chat(openai_client: openai.AsyncOpenAI):
    answer = await openai_client.chat.completions.create(model="tiny", messages=USER)
    assert answer.choices[0].message.content == "Hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_stream_with_usage(openai_client: openai.AsyncOpenAI):
    stream = await openai_client.chat.completions.create(
        model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello world"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None


async def test_choices_and_logprobs(openai_client: openai.AsyncOpenAI):
    answer = await openai_client.chat.completions.create(
        model="tiny", messages=USER, n=2, logprobs=True, top_logprobs=3, seed=1, stop=["zzz"]
    )
    assert [c.index for c in answer.choices] == [0, 1]
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert bytes(b for e in logprobs.content for b in e.bytes or []) == b"Hello world"
    assert len(logprobs.content[0].top_logprobs) == 3


async def test_tools(openai_client: openai.AsyncOpenAI, engine: ScriptedEngine):
    engine.text = "Let me see. " + CALL + "\n" + CALL
    answer = await openai_client.chat.completions.create(model="tiny", messages=USER, tools=TOOLS)
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert [c.function.arguments for c in calls if c.type == "function"] == ['{"city": "Paris"}'] * 2  # type: ignore[union-attr]
    assert answer.choices[0].finish_reason == "tool_calls"
    messages = [*USER, answer.choices[0].message, {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"}]
    engine.text = "Sunny."
    after = await openai_client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS)
    assert after.choices[0].message.content == "Sunny."


async def test_streamed_tools(openai_client: openai.AsyncOpenAI, engine: ScriptedEngine):
    engine.text = CALL + CALL
    async with openai_client.chat.completions.stream(model="tiny", messages=USER, tools=TOOLS) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert [c.function.name for c in calls] == ["get_weather"] * 2
    assert len({c.id for c in calls}) == 2
    assert calls[1].function.arguments == '{"city": "Paris"}'


async def test_completions(openai_client: openai.AsyncOpenAI):
    answer = await openai_client.completions.create(model="tiny", prompt=["a", "b"], logprobs=1, echo=True)
    assert [c.text for c in answer.choices] == ["aHello world", "bHello world"]
    text = ""
    async for chunk in await openai_client.completions.create(model="tiny", prompt="a", stream=True):
        text += chunk.choices[0].text
    assert text == "Hello world"


async def test_models(openai_client: openai.AsyncOpenAI):
    assert [m.id async for m in openai_client.models.list()] == ["tiny", "tiny-alias", "adapter"]
    assert (await openai_client.models.retrieve("tiny")).id == "tiny"


async def test_errors_are_the_client_s_own(openai_client: openai.AsyncOpenAI, engine: ScriptedEngine):
    with pytest.raises(openai.NotFoundError) as missing:
        await openai_client.chat.completions.create(model="other", messages=USER)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        await openai_client.chat.completions.create(model="tiny", messages=USER, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        await openai_client.with_options(api_key="wrong").models.list()
    engine.error, engine.error_after = RuntimeError("defect"), 1
    with pytest.raises(openai.APIError, match="failed on this request"):
        async for _ in await openai_client.chat.completions.create(model="tiny", messages=USER, stream=True):
            pass
