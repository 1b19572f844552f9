"""The server on a real socket: clients that leave, stall, trickle or attack; deadlines, draining, TLS."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from scripted import ScriptedEngine, make_card

from core.messages import ConfigError
from core.openai.app import create_app
from core.openai.pipeline import Pipeline
from core.openai.server import HttpServer
from core.openai.settings import HttpSettings
from core.openai.tokenizer import TextTokenizer

Serve = Callable[..., Awaitable[HttpServer]]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True}


@pytest.fixture
async def serve(pipeline: Pipeline) -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def start(**settings: Any) -> HttpServer:
            chosen = HttpSettings(**{"port": 0, **settings})
            return await stack.enter_async_context(HttpServer(create_app(pipeline, chosen), chosen))

        yield start


def head(body: bytes, *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        % size
    ) + body


@asynccontextmanager
async def connect(server: HttpServer) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def within(seconds: float, condition: Callable[[], bool]) -> float:
    """Waits for a condition, at most `seconds`; how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not so after {seconds} seconds"
        await asyncio.sleep(0.01)
    return time.monotonic() - start


@pytest.mark.parametrize("busy", [True, False], ids=["streaming", "thinking"])
@pytest.mark.parametrize("stream", [True, False], ids=["sse", "json"])
async def test_a_client_that_leaves_frees_the_engine_within_a_second(
    serve: Serve, engine: ScriptedEngine, stream: bool, busy: bool
):
    server = await serve()
    engine.forever = True
    engine.gate = None if busy else asyncio.Event()
    async with connect(server) as (reader, writer):
        writer.write(head(json.dumps({**CHAT, "stream": stream}).encode()))
        await engine.started.wait()
        if stream:
            await reader.readuntil(b"data: ")
    assert await within(5, lambda: engine.running == 0) < 1.0
    await within(1, lambda: not server.connections)


async def test_all_choices_end_with_their_client(serve: Serve, engine: ScriptedEngine):
    server = await serve()
    engine.gate = asyncio.Event()
    async with connect(server) as (reader, writer):
        writer.write(head(json.dumps({**CHAT, "stream": True, "n": 4}).encode()))
        await reader.readuntil(b"data: ")
        await within(2, lambda: engine.running == 4)
    assert await within(5, lambda: engine.running == 0) < 1.0


@pytest.mark.parametrize("stream", [True, False])
async def test_the_deadline_ends_a_request_in_one_error(serve: Serve, engine: ScriptedEngine, stream: bool):
    server = await serve(request_timeout=0.3)
    engine.gate = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        assert engine.running == 0
        if stream:
            *_, last, rest = response.text.split("\n\n")
            assert rest == ""
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert response.status_code == 504
            error = response.json()["error"]
        assert "within 0.3 seconds" in error["message"]
        assert error["code"] == "deadline_exceeded"
        assert (await client.get("/live")).status_code == 200, "the connection can be used further"


async def test_a_client_that_does_not_read_is_dropped(serve: Serve, engine: ScriptedEngine):
    server = await serve(slow_client_timeout=0.4)
    engine.forever = True
    engine.text = "The quick brown fox jumps over the lazy dog" * 20
    engine.per_delta = 100
    async with connect(server) as (_, writer):
        writer.transport.pause_reading()
        writer.write(head(json.dumps({**CHAT, "stream": True}).encode()))
        await engine.started.wait()
        await within(10, lambda: engine.running == 0)
        await within(2, lambda: not server.connections)


async def test_a_request_that_is_never_complete_is_not_waited_for(serve: Serve):
    server = await serve(header_timeout=0.3)
    async with connect(server) as (reader, writer):
        writer.write(b"POST /v1/chat/completions HTT")
        assert await asyncio.wait_for(reader.read(), 5) == b""
    async with connect(server) as (reader, _):
        assert await asyncio.wait_for(reader.read(), 5) == b"", "not a byte was sent"
    async with connect(server) as (reader, writer):
        writer.write(head(b'{"model"', length=100))
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"was not complete after 0.3 seconds" in answer


async def test_idle_connections_are_kept_and_then_closed(serve: Serve):
    server = await serve(keep_alive_timeout=1, header_timeout=0.2)
    async with connect(server) as (reader, writer):
        for _ in range(2):
            writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await asyncio.wait_for(reader.readuntil(b"}"), 5)
            await asyncio.sleep(0.6)  # longer than the header timeout, shorter than keep-alive
        start = time.monotonic()
        assert await asyncio.wait_for(reader.read(), 5) == b""
        assert time.monotonic() - start < 2


async def test_heads_that_are_too_large_or_no_http(serve: Serve):
    server = await serve(max_header_size=2000)
    for sent, status in (
        (b"GET /live HTTP/1.1\r\nx: " + b"y" * 5000, b"431"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
    ):
        async with connect(server) as (reader, writer):
            writer.write(sent)
            answer = await asyncio.wait_for(reader.read(), 5)
            assert answer.startswith(b"HTTP/1.1 " + status)
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert error["type"] == "invalid_request_error"
    async with connect(server) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nx: " + b"y" * 1900 + b"\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_many_small_requests_on_one_connection_are_no_large_head(serve: Serve):
    server = await serve(max_header_size=200)
    async with connect(server) as (reader, writer):
        for _ in range(20):
            writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b" 200 " in await asyncio.wait_for(reader.readline(), 5)
            await reader.readuntil(b"}")


async def test_a_large_upload_is_refused_before_it_is_read(serve: Serve):
    server = await serve(max_body_size=1000)
    async with connect(server) as (reader, writer):
        writer.write(head(b"", length=10**12))
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in answer


async def test_draining_lets_requests_finish(serve: Serve, engine: ScriptedEngine):
    server = await serve()
    engine.gate = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url) as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await engine.started.wait()
        draining = asyncio.create_task(server.drain(30))
        await within(5, lambda: _refuses(server.port))
        assert not draining.done()
        engine.gate.set()
        assert (await asked).json()["choices"][0]["message"]["content"] == "Hello world"
        assert await asyncio.wait_for(draining, 5) is True
    await asyncio.wait_for(server.closed(), 1)


def _refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("drain", [True, False])
async def test_stopping_ends_requests_in_one_error(serve: Serve, engine: ScriptedEngine, drain: bool):
    server = await serve()
    engine.gate = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url) as client:
        whole = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        streamed = asyncio.create_task(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
        await within(5, lambda: engine.running == 2)
        if drain:
            assert await server.drain(0.2) is False
        else:
            await server.stop()
        assert engine.running == 0
        assert (await whole).status_code == 503
        assert "is stopping" in (await whole).json()["error"]["message"]
        assert "is stopping" in (await streamed).text.split("\n\n")[-2]
    await server.stop()


async def test_a_server_that_was_not_started_can_be_stopped(pipeline: Pipeline):
    server = HttpServer(create_app(pipeline), HttpSettings(port=0))
    await server.stop()
    assert await server.drain() is True
    await server.closed()


async def test_a_taken_port_is_one_sentence(serve: Serve, pipeline: Pipeline):
    server = await serve()
    with pytest.raises(ConfigError, match=rf"Port {server.port} on 127\.0\.0\.1 is taken by another program"):
        await HttpServer(create_app(pipeline), HttpSettings(port=server.port)).start()
    with pytest.raises(ConfigError, match="use an address of this machine"):
        await HttpServer(create_app(pipeline), HttpSettings(host="192.0.2.1", port=0)).start()
    with pytest.raises(ConfigError, match="is not known"):
        await HttpServer(create_app(pipeline), HttpSettings(host="no.such.host.invalid", port=0)).start()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


async def test_tls(serve: Serve, engine: ScriptedEngine, certificate: tuple[Path, Path]):
    server = await serve(ssl_certfile=str(certificate[0]), ssl_keyfile=str(certificate[1]))
    assert server.url.startswith("https://")
    context = ssl.create_default_context(cafile=certificate[0])
    async with httpx.AsyncClient(base_url=server.url, verify=context) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        assert response.text.endswith("data: [DONE]\n\n")


@pytest.fixture
def locked_key(tmp_path: Path, certificate: tuple[Path, Path]) -> Path:
    key = tmp_path / "locked.pem"
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", certificate[1], "-out", key]
    subprocess.run(command, check=True, capture_output=True)
    return key


async def test_bad_tls_files_are_one_sentence(
    serve: Serve, tmp_path: Path, certificate: tuple[Path, Path], locked_key: Path
):
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for settings, sentence in (
        ({"ssl_certfile": str(certificate[0]), "ssl_keyfile": str(locked_key)}, "unencrypted"),
        ({"ssl_keyfile": str(certificate[1])}, "without ssl-certfile"),
        ({"ssl_certfile": "missing.pem"}, r"'missing\.pem' does not exist"),
        ({"ssl_certfile": str(wrong), "ssl_keyfile": str(certificate[1])}, "cannot be used for TLS"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            await serve(**settings)


async def test_long_prompts_do_not_hold_up_short_ones(
    make_pipeline: Callable[..., Pipeline], make_client: Callable[..., httpx.AsyncClient]
):
    client = make_client(make_pipeline(fast_tokenizer=False))
    text = "The quick brown fox jumps over the lazy dog. " * 40_000
    long = asyncio.create_task(client.post("/v1/tokenize", json={"prompt": text}))
    slowest = 0.0
    answered = 0
    while not long.done():
        start = time.monotonic()
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        slowest = max(slowest, time.monotonic() - start)
        answered += 1
    assert (await long).json()["count"] > 100_000
    assert answered > 5, "short requests were answered while the long one was tokenized"


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_every_event_leaves_when_it_is_written(
    folder: Path, tokenizer: TextTokenizer, runner: Callable[[Coroutine[Any, Any, None]], None]
):
    """Nagle's algorithm is off on accepted connections, on both event loops."""

    async def check() -> None:
        settings = HttpSettings(port=0)
        with Pipeline(make_card(folder), ScriptedEngine(tokenizer).generate) as pipeline:
            async with HttpServer(create_app(pipeline, settings), settings) as server, connect(server):
                await within(5, lambda: len(server.connections) == 1)
                accepted = server.connections[0].transport.get_extra_info("socket")
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1

    runner(check())


async def test_nothing_is_left_behind(engine: ScriptedEngine, pipeline: Pipeline):
    app = create_app(pipeline, HttpSettings(port=0))
    watch = app.state.watch
    server = HttpServer(app, HttpSettings(port=0))
    await server.start()
    engine.gate = asyncio.Event()
    async with connect(server) as (reader, writer):
        writer.write(head(json.dumps({**CHAT, "stream": True}).encode()))
        await reader.readuntil(b"data: ")
        (exchange,) = watch.active
        await within(2, lambda: exchange.watcher is not None)
        watch.check_integrity()
        engine.gate.set()
        await reader.readuntil(b"[DONE]")
    await server.stop()
    assert watch.active == set()
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert not {n for n in names if n.startswith("http-")}, names
