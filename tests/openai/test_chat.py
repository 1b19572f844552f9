"""Chat completions through HTTP: what the engine is asked, what the client gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from answers import CALL, WEATHER, events
from scripted import CHATML, ScriptedEngine, make_card, make_tokenizer

from core.messages import (
    Constraint,
    ConstraintKind,
)
from core.openai.pipeline import Pipeline

URL = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]


def body(**fields: object) -> dict[str, object]:
    return {"model": "tiny", "messages": USER, **fields}


async def test_whole_answer(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.cached = 16
    response = await client.post(URL, json=body(max_tokens=50))
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["id"] == f"chatcmpl-{engine.requests[0].request_id}"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt, output = len(engine.requests[0].token_ids), len(engine.ids(engine.requests[0])) + 1
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


async def test_streamed_answer(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.text = "Hello 👩‍👩‍👧 東京都 world"
    chunks = events(await client.post(URL, json=body(stream=True, stream_options={"include_usage": True})))
    *content, finish, usage = chunks
    assert content[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["choices"][0]["delta"]["content"] for c in content) == engine.text
    assert all(c["choices"][0]["finish_reason"] is None and c["usage"] is None for c in content)
    assert all("role" not in c["choices"][0]["delta"] for c in content[1:])
    assert finish["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(engine.ids(engine.requests[0])) + 1
    assert len({c["id"] for c in chunks}) == len({c["created"] for c in chunks}) == 1


@pytest.mark.parametrize("per_delta", [1, 2, 100])
async def test_deltas_may_hold_several_tokens(client: httpx.AsyncClient, engine: ScriptedEngine, per_delta: int):
    engine.text, engine.per_delta = "The quick brown fox 😀 jumps", per_delta
    chunks = events(await client.post(URL, json=body(stream=True, max_tokens=100)))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == engine.text
    assert "usage" not in chunks[0]


async def test_parameters_reach_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine):
    response = await client.post(
        URL,
        json=body(
            temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
            repetition_penalty=1.5, seed=7, logit_bias={"5": -100}, stop=["x"], stop_token_ids=[9], ignore_eos=True,
            min_tokens=2, max_tokens=3, bad_words=["fox"], priority=4, cache_salt="s", user="u", logprobs=True,
            top_logprobs=3, unknown={"field": [1]}, reasoning_effort="low",
        ),
    )  # fmt: skip
    assert response.status_code == 200, response.text
    request, context = engine.requests[0], engine.contexts[0]
    sampling, stop = request.sampling, request.stop
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert (sampling.seed, sampling.logit_bias) == (7, {5: -100})
    fox = [tuple(engine.tokenizer.encode(w, add_special_tokens=False)) for w in ("fox", " fox")]
    assert list(sampling.bad_token_sequences) == fox
    assert (stop.max_tokens, stop.min_tokens, stop.stop_token_ids, stop.ignore_eos) == (3, 2, (9,), True)
    assert (request.priority, request.cache_salt, request.logprobs) == (4, "s", 3)
    assert (context.session, context.priority) == ("u", 4)
    assert context.deadline is not None


async def test_nulls_are_absent_fields(client: httpx.AsyncClient, engine: ScriptedEngine):
    names = (
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
        "tools",
        "tool_choice",
        "logit_bias",
        "stream",
        "response_format",
    )
    assert (await client.post(URL, json=body(**dict.fromkeys(names)))).status_code == 200
    assert engine.requests[0].sampling.temperature == 1.0


async def test_max_completion_tokens_wins_and_room_is_the_limit(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.text = "The quick brown fox"
    await client.post(URL, json=body(max_tokens=9, max_completion_tokens=2))
    response = await client.post(URL, json=body(max_tokens=10**6))
    assert engine.requests[0].stop.max_tokens == 2
    assert engine.requests[1].stop.max_tokens == 512 - response.json()["usage"]["prompt_tokens"]
    response = await client.post(URL, json=body(max_tokens=2))
    assert response.json()["choices"][0]["finish_reason"] == "length"


async def test_choices_are_interleaved_with_seeds_of_their_own(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.text = "The quick brown fox"
    chunks = events(await client.post(URL, json=body(stream=True, n=3, seed=11, max_tokens=40)))
    order = [c["choices"][0]["index"] for c in chunks]
    assert set(order) == {0, 1, 2}
    assert order != sorted(order), "no choice waits for another"
    for index in range(3):
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"][0]["index"] == index)
        assert text == engine.text
    seeds = [r.sampling.seed for r in engine.requests]
    assert seeds[0] == 11
    assert len(set(seeds)) == 3
    assert len({r.request_id for r in engine.requests}) == 3
    answer = (await client.post(URL, json=body(n=2, max_tokens=40))).json()
    assert [c["message"]["content"] for c in answer["choices"]] == [engine.text] * 2
    assert answer["usage"]["prompt_tokens"] == len(engine.requests[-1].token_ids), "a prompt counts once"
    assert engine.running == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_stop_strings_end_the_engine_and_are_not_shown(
    client: httpx.AsyncClient, engine: ScriptedEngine, stream: bool
):
    engine.text = "The quick brown fox jumps over the lazy dog."
    response = await client.post(URL, json=body(stop=["nowhere", "n fox j"], stream=stream, max_tokens=100))
    if stream:
        chunks = events(response)
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("The quick brow", "stop")
    assert (engine.running, engine.completed) == (0, 0), "the engine was aborted, not drained"


async def test_stop_string_is_kept_on_request(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.text = "The quick brown fox"
    response = await client.post(URL, json=body(stop="quick", include_stop_str_in_output=True))
    assert response.json()["choices"][0]["message"]["content"] == "The quick"


async def test_special_tokens_are_shown_on_request(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.text = "a<|im_start|>b"
    response = await client.post(URL, json=body(skip_special_tokens=False))
    assert response.json()["choices"][0]["message"]["content"] == "a<|im_start|>b"
    assert (await client.post(URL, json=body())).json()["choices"][0]["message"]["content"] == "ab"


async def test_logprobs(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.text = "fox 😀"
    whole = (await client.post(URL, json=body(logprobs=True, top_logprobs=2))).json()["choices"][0]
    entries = whole["logprobs"]["content"]
    ids = engine.ids(engine.requests[0])
    assert [e["logprob"] for e in entries] == [-i / 100 for i in ids], "the hidden end has no entry"
    assert bytes(b for e in entries for b in e["bytes"]).decode() == "fox 😀"
    assert all(len(e["top_logprobs"]) == 2 for e in entries)
    chunks = events(await client.post(URL, json=body(logprobs=True, top_logprobs=2, stream=True)))
    streamed = [e for c in chunks if (found := c["choices"][0]["logprobs"]) for e in found["content"]]
    assert streamed == entries
    named = (await client.post(URL, json=body(logprobs=True, return_tokens_as_token_ids=True))).json()
    assert named["choices"][0]["logprobs"]["content"][0]["token"] == f"token_id:{ids[0]}"


async def test_logprobs_do_not_tell_a_withheld_stop_string(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.text = "The quick brown fox"
    fields: dict[str, Any] = {"logprobs": True, "stop": " brown fox"}
    choice = (await client.post(URL, json=body(**fields))).json()["choices"][0]
    shown = bytes(b for e in choice["logprobs"]["content"] for b in e["bytes"]).decode()
    assert shown == choice["message"]["content"] == "The quick"
    engine.text = "The quick brown dog"
    chunks = events(await client.post(URL, json=body(stream=True, **fields)))
    text = ""
    told = b""
    for chunk in chunks:
        choice = chunk["choices"][0]
        text += choice["delta"].get("content", "")
        told += bytes(b for e in (choice["logprobs"] or {"content": []})["content"] for b in e["bytes"])
        assert len(told.decode()) <= len(text)
    assert told.decode() == text == engine.text


async def test_usage_in_every_chunk(client: httpx.AsyncClient, engine: ScriptedEngine):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(await client.post(URL, json=body(stream=True, stream_options=options)))
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == len(engine.ids(engine.requests[0])) + 1


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"response_format": {"type": "json_object"}}, Constraint(ConstraintKind.JSON_OBJECT)),
        ({"response_format": {"type": "text"}}, None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
            Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}'),
        ),
        ({"guided_regex": "a+"}, Constraint(ConstraintKind.REGEX, "a+")),
        ({"guided_choice": ["a", "b"]}, Constraint(ConstraintKind.CHOICE, '["a","b"]')),
        ({"structured_outputs": {"grammar": "start: /a/"}}, Constraint(ConstraintKind.GRAMMAR, "start: /a/")),
        ({"guided_json": '{"type": "object"}'}, Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "object"}')),
    ],
)
async def test_structured_output(
    client: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], wanted: Constraint | None
):
    assert (await client.post(URL, json=body(**fields))).status_code == 200
    assert engine.requests[0].constraint == wanted


async def test_the_chat_template_makes_the_prompt(client: httpx.AsyncClient, engine: ScriptedEngine):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "東"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    response = await client.post(URL, json=body(messages=messages, tools=[WEATHER]))
    assert response.status_code == 200, response.text
    assert engine.tokenizer.decode(engine.requests[0].token_ids) == (
        '<|im_start|>system\nTools: [{"type": "function", "function": {"name": "get_weather", "parameters": '
        '{"type": "object"}}}] Call in <tool_call> tags.<|im_end|>\n'
        "<|im_start|>developer\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "get_weather", "arguments": {"city": "東"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_the_last_message_can_be_continued(client: httpx.AsyncClient, engine: ScriptedEngine):
    messages = [*USER, {"role": "assistant", "content": "Once upon"}]
    await client.post(URL, json=body(messages=messages, continue_final_message=True))
    assert engine.tokenizer.decode(engine.requests[0].token_ids).endswith("assistant\nOnce upon")


@pytest.mark.parametrize("stream", [True, False])
async def test_tool_calls(client: httpx.AsyncClient, engine: ScriptedEngine, stream: bool):
    engine.text = "I look." + CALL
    response = await client.post(URL, json=body(tools=[WEATHER], stream=stream, max_tokens=200))
    if stream:
        chunks = events(response)
        deltas = [c["choices"][0]["delta"] for c in chunks]
        calls = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
        assert calls[0]["function"] == {"name": "get_weather", "arguments": ""}
        assert calls[0]["type"] == "function"
        assert all("id" not in c for c in calls[1:])
        arguments = "".join(c["function"]["arguments"] for c in calls)
        content = "".join(d.get("content", "") for d in deltas)
        reason = chunks[-1]["choices"][0]["finish_reason"]
        assert len(calls) > 2, "arguments come as they are written"
    else:
        choice = response.json()["choices"][0]
        call = choice["message"]["tool_calls"][0]
        assert call["id"].startswith("call_")
        arguments, content, reason = (
            call["function"]["arguments"],
            choice["message"]["content"],
            choice["finish_reason"],
        )
    assert (arguments, content, reason) == ('{"city": "Paris"}', "I look.", "tool_calls")


async def test_content_is_null_beside_calls_alone(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.text = CALL
    choice = (await client.post(URL, json=body(tools=[WEATHER], max_tokens=200))).json()["choices"][0]
    assert choice["message"]["content"] is None


async def test_tools_are_off_with_none(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.text = CALL
    response = await client.post(URL, json=body(tools=[WEATHER], tool_choice="none", max_tokens=200))
    assert response.json()["choices"][0]["message"]["content"] == CALL
    assert "Tools:" not in engine.tokenizer.decode(engine.requests[0].token_ids)


async def test_a_named_function_is_forced_by_a_schema(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.text = '{"city": "Paris"}'
    choice = {"type": "function", "function": {"name": "get_weather"}}
    answer = (await client.post(URL, json=body(tools=[WEATHER], tool_choice=choice, max_tokens=99))).json()
    assert engine.requests[0].constraint == Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')
    function = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert function == {"name": "get_weather", "arguments": '{"city": "Paris"}'}


async def test_some_call_is_forced_by_a_schema(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.text = '[{"name": "get_weather", "parameters": {"city": "Paris"}}]'
    fields: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    answer = (await client.post(URL, json=body(**fields, max_tokens=99))).json()
    constraint = engine.requests[0].constraint
    assert constraint is not None
    schema = json.loads(constraint.value)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris"}'


async def test_reasoning_is_split_off(
    tmp_path_factory: pytest.TempPathFactory,
    engine: ScriptedEngine,
    make_pipeline: Callable[..., Pipeline],
    make_client: Callable[..., httpx.AsyncClient],
):
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    folder = make_tokenizer(tmp_path_factory.mktemp("thinker"), template=template)
    client = make_client(make_pipeline(make_card(folder)))
    engine.text = "hm, well\n</think>\n\nHello"
    message = (await client.post(URL, json=body())).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm, well", "Hello")
    chunks = events(await client.post(URL, json=body(stream=True)))
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "hm, well"
    assert "".join(d.get("content", "") for d in deltas) == "Hello"
    message = (await client.post(URL, json=body(include_reasoning=False))).json()["choices"][0]["message"]
    assert "reasoning_content" not in message
    engine.text = '{"a": 1}'
    fields = {"response_format": {"type": "json_object"}}
    message = (await client.post(URL, json=body(**fields))).json()["choices"][0]["message"]
    assert message["content"] == '{"a": 1}', "a constrained answer has no reasoning"


async def test_adapters_are_models(client: httpx.AsyncClient, engine: ScriptedEngine):
    assert (await client.post(URL, json=body(model="adapter"))).json()["model"] == "adapter"
    assert (await client.post(URL, json=body(model="tiny-alias"))).status_code == 200
    assert [r.lora for r in engine.requests] == ["adapter", None]
