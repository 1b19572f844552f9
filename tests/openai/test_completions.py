"""Plain completions, tokenizing, and the small endpoints."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from answers import error, events
from scripted import ScriptedEngine

from core.messages import Unavailable
from core.observe import Metrics
from core.openai.pipeline import Pipeline

URL = "/v1/completions"


def body(**fields: object) -> dict[str, object]:
    return {"model": "tiny", "prompt": "The quick", **fields}


async def test_every_kind_of_prompt(client: httpx.AsyncClient, engine: ScriptedEngine):
    ids = engine.tokenizer.encode("The quick", add_special_tokens=False)
    for prompt, count in (("The quick", 1), (["The quick", "fox"], 2), (ids, 1), ([ids, ids[:1]], 2)):
        engine.requests.clear()
        answer = (await client.post(URL, json=body(prompt=prompt, n=2))).json()
        assert [c["index"] for c in answer["choices"]] == list(range(2 * count))
        assert [c["text"] for c in answer["choices"]] == ["Hello world"] * 2 * count
        assert engine.requests[0].token_ids == ids
        assert len({r.request_id for r in engine.requests}) == 2 * count
        prompts = sum(len(r.token_ids) for r in engine.requests) // 2
        assert answer["usage"]["prompt_tokens"] == prompts


async def test_sixteen_tokens_by_default(client: httpx.AsyncClient, engine: ScriptedEngine):
    await client.post(URL, json=body())
    assert engine.requests[0].stop.max_tokens == 16


async def test_streamed(client: httpx.AsyncClient, engine: ScriptedEngine):
    engine.text = "東京都 😀"
    chunks = events(await client.post(URL, json=body(stream=True, stream_options={"include_usage": True})))
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "東京都 😀"
    assert chunks[0]["object"] == "text_completion"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("as_ids", [True, False])
async def test_echo_with_logprobs(client: httpx.AsyncClient, engine: ScriptedEngine, stream: bool, as_ids: bool):
    ids = engine.tokenizer.encode("The quick", add_special_tokens=False)
    fields: dict[str, Any] = {"prompt": ids if as_ids else "The quick", "echo": True, "logprobs": 2, "stream": stream}
    response = await client.post(URL, json=body(**fields))
    if stream:
        chunks = [c["choices"][0] for c in events(response)]
        text = "".join(c["text"] for c in chunks)
        shapes = [c["logprobs"] for c in chunks if c["logprobs"]]
        logprobs = {k: [x for s in shapes for x in s[k]] for k in shapes[0]}
    else:
        choice = response.json()["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
    assert text == "The quickHello world"
    assert "".join(logprobs["tokens"]) == text
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert len(logprobs["top_logprobs"][1]) == 2
    offsets = logprobs["text_offset"]
    assert [text[a:b] for a, b in zip(offsets, [*offsets[1:], len(text)], strict=True)] == logprobs["tokens"]


async def test_scoring_a_text_generates_nothing(client: httpx.AsyncClient):
    answer = (await client.post(URL, json=body(echo=True, logprobs=1, max_tokens=0))).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("The quick", "length")
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"suffix": "end"}, "suffix", "is not supported"),
        ({"best_of": 3}, "best_of", "make them equal"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt": [[]]}, "prompt", "is empty"),
        ({"prompt": ["a", 1]}, "prompt", "mixes"),
        ({"prompt": ["a"] * 600, "n": 2}, "prompt", "1200 texts"),
        ({"prompt": ["a", ""]}, "prompt", "is empty"),
        ({"prompt": [99999]}, "prompt", "ids are 0 to"),
        ({"prompt": [-1]}, "prompt[0]", "at least 0"),
        ({"max_tokens": 0}, "max_tokens", "unless 'echo'"),
        ({"prompt": "Hello " * 600}, "prompt", "512 tokens"),
    ],
)
async def test_refused(client: httpx.AsyncClient, fields: dict[str, Any], param: str, sentence: str):
    assert sentence in error(await client.post(URL, json=body(**fields)), 400, param)


async def test_best_of_equal_to_n_and_empty_suffix_change_nothing(client: httpx.AsyncClient):
    assert (await client.post(URL, json=body(best_of=2, n=2, suffix=""))).status_code == 200


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_tokenize_and_back(client: httpx.AsyncClient, prefix: str):
    tokens = (
        await client.post(f"{prefix}/tokenize", json={"prompt": "The quick 東", "return_token_strs": True})
    ).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 512
    text = (await client.post(f"{prefix}/detokenize", json={"tokens": tokens["tokens"]})).json()
    assert text == {"prompt": "The quick 東"}


async def test_tokenize_a_conversation(client: httpx.AsyncClient, engine: ScriptedEngine):
    messages = [{"role": "user", "content": "Hello"}]
    tokens = (await client.post("/v1/tokenize", json={"messages": messages})).json()["tokens"]
    await client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert tokens == engine.requests[0].token_ids
    assert (await client.post("/v1/tokenize", json={"prompt": ""})).json()["tokens"] == []


async def test_tokenize_refuses_what_it_cannot_do(client: httpx.AsyncClient):
    error(await client.post("/v1/tokenize", json={}), 400, "prompt")
    error(await client.post("/v1/tokenize", json={"prompt": "a", "model": "other"}), 404, "model")
    error(await client.post("/v1/detokenize", json={"tokens": [99999]}), 400, "tokens")


async def test_models(client: httpx.AsyncClient):
    models = (await client.get("/v1/models")).json()
    assert [m["id"] for m in models["data"]] == ["tiny", "tiny-alias", "adapter"]
    assert models["data"][2]["root"] == "tiny"
    one = (await client.get("/v1/models/tiny")).json()
    assert one == models["data"][0]
    assert one["max_model_len"] == 512
    error(await client.get("/v1/models/other/name"), 404, "model")


async def test_health_tells_why_not(pipeline: Pipeline, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch):
    assert (await client.get("/health")).json()["status"] == "ok"

    async def no_worker() -> None:
        raise Unavailable("No worker is alive.")

    monkeypatch.setattr(pipeline, "check_ready", no_worker)
    response = await client.get("/health")
    assert (response.status_code, response.json()["reason"]) == (503, "No worker is alive.")
    assert (await client.get("/live")).status_code == 200
    assert (await client.get("/version")).json()["version"]


async def test_metrics_count_what_happened(
    make_pipeline: Callable[..., Pipeline], make_client: Callable[..., httpx.AsyncClient], engine: ScriptedEngine
):
    metrics = Metrics()
    client = make_client(make_pipeline(metrics=metrics), metrics)
    engine.cached = 4
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
    await client.post("/v1/chat/completions", json={**chat, "stream": True})
    await client.post("/v1/chat/completions", json={**chat, "temperature": 9})
    text = (await client.get("/metrics")).text
    prompt, output = len(engine.requests[0].token_ids), len(engine.ids(engine.requests[0])) + 1
    for line in (
        'dynamo_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0',
        'dynamo_requests_total{endpoint="/v1/chat/completions",status="400"} 1.0',
        'dynamo_choices_total{finish="stop"} 1.0',
        f"dynamo_prompt_tokens_total {prompt}.0",
        f"dynamo_output_tokens_total {output}.0",
        "dynamo_cached_tokens_total 4.0",
        "dynamo_requests_in_flight 0.0",
        "dynamo_time_to_first_token_seconds_count 1.0",
        "dynamo_request_duration_seconds_count 2.0",
    ):
        assert line in text.splitlines(), text


async def test_paths_and_methods_that_are_not_there(client: httpx.AsyncClient):
    assert "/docs lists them" in error(await client.get("/v2/chat"), 404)
    response = await client.get(URL)
    assert "use POST" in error(response, 405)
    assert response.headers["allow"] == "POST"
    assert response.headers["x-request-id"]
    assert "use GET, HEAD" in error(await client.put("/v1/models"), 405)
    await client.get("/v3/chat")
    lines = (await client.get("/metrics")).text.splitlines()
    assert 'dynamo_requests_total{endpoint="other",status="404"} 2.0' in lines, "one label for all of them"
    assert f'dynamo_requests_total{{endpoint="{URL}",status="405"}} 1.0' in lines


async def test_the_log_has_the_path_that_is_not_there(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="dynamo.access"):
        await client.get("/v2/" + "x" * 300)
    (record,) = [r for r in caplog.records if r.name == "dynamo.access"]
    line = json.loads(record.getMessage())
    assert (line["path"], line["status"]) == (f"/v2/{'x' * 196}", 404)


async def test_the_first_token_is_measured_when_it_comes(
    make_pipeline: Callable[..., Pipeline], make_client: Callable[..., httpx.AsyncClient], engine: ScriptedEngine
):
    metrics = Metrics()
    client = make_client(make_pipeline(metrics=metrics), metrics)
    engine.gate, engine.free = asyncio.Event(), 1
    asked = asyncio.create_task(client.post(URL, json=body(stream=True)))
    async with asyncio.timeout(5):
        while not metrics.time_to_first_token.count:  # noqa: ASYNC110  a figure to look at, no event
            await asyncio.sleep(0)
    assert not asked.done()
    engine.gate.set()
    await asked
    assert metrics.time_to_first_token.count == 1


async def test_only_json_bodies(client: httpx.AsyncClient):
    raw = b'{"model": "tiny", "prompt": "x"}'
    for kind, status in (
        ("application/json; charset=utf-8", 200),
        ("application/vnd.x+json", 200),
        (None, 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
    ):
        headers = {} if kind is None else {"content-type": kind}
        response = await client.post(URL, content=raw, headers=headers)
        assert response.status_code == status, kind
        if status == 415:
            error(response, 415)


async def test_large_bodies_are_refused(pipeline: Pipeline, make_client: Callable[..., httpx.AsyncClient]):
    client = make_client(pipeline, max_body_size=200)

    async def trickle() -> Any:
        for _ in range(10):
            yield b" " * 50

    json_type = {"content-type": "application/json"}
    assert "201 bytes" in error(await client.post(URL, content=b" " * 201, headers=json_type), 413)
    assert "at most 200" in error(await client.post(URL, content=trickle(), headers=json_type), 413)


async def test_api_keys(pipeline: Pipeline, make_client: Callable[..., httpx.AsyncClient]):
    client = make_client(pipeline, api_keys=("first-key", "sécond"))
    for header, status in (
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer ", 401),
        ("Basic first-key", 401),
        ("first-key", 401),
        ("Bearer first-key", 200),
        ("bearer first-key", 200),
        ("Bearer sécond", 200),
    ):
        headers = {} if header is None else {"authorization": header.encode()}
        response = await client.get("/v1/models", headers=headers)
        assert response.status_code == status, header
        if status == 401:
            error(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
    for path in ("/health", "/live", "/metrics", "/version", "/openapi.json"):
        assert (await client.get(path)).status_code == 200
    for path in ("/tokenize", URL, "/v1/chat/completions"):
        assert (await client.post(path, json={})).status_code == 401


async def test_cors_is_off_unless_asked(pipeline: Pipeline, make_client: Callable[..., httpx.AsyncClient]):
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    response = await make_client(pipeline).options(URL, headers=asked)
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers
    response = await make_client(pipeline, cors_origins=("https://page.example",)).options(URL, headers=asked)
    assert response.headers["access-control-allow-origin"] == "https://page.example"


async def test_more_requests_than_allowed_are_refused(
    pipeline: Pipeline, make_client: Callable[..., httpx.AsyncClient]
):
    client = make_client(pipeline, max_requests=0)
    response = await client.post(URL, json=body())
    assert "already" in error(response, 429)
    assert response.headers["retry-after"] == "1"
